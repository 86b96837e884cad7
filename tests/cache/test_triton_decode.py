"""The Triton kernel gives what the PyTorch path gives, run in Triton's interpreter, and compiles; both without a GPU.

The interpreter is chosen when triton is imported, so that a process of its own runs all cases at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_cases
from families import tiny_model
from kv_plans import kv_plan
from triton_cases import BATCH, CASES

from sinkquant.cache import attention
from sinkquant.cache.layer import SinkLayer


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    paths = [str(Path(triton_cases.__file__).parent), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run([sys.executable, triton_cases.__file__], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_a_float64_reference(measured: dict[str, dict[str, Any]], name: str) -> None:
    case, found = CASES[name], measured[name]
    assert found["read"]
    assert found["same dtype"]
    assert found["finite"]
    assert found["shape"] == [BATCH, 1, case.heads, case.value_dim]
    bound = 2e-5 if case.dtype == torch.float32 else 2e-2
    assert found["torch"] < bound
    assert found["kernel"] < bound


@pytest.mark.parametrize(("capability", "width", "bits", "precision", "capped"), [
    (80, 128, 3, "tf32", True), (90, 256, 2, "tf32", False)])
def test_the_kernel_compiles_for_gpus_and_fits_small_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                          capability: int, width: int, bits: int, precision: str,
                                                          capped: bool) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sinkquant.cache import triton_decode

    numbers = dict.fromkeys(("blocks", "per_program", "kv_heads"), "i32") | {"softcap": "fp32"}
    tensors = dict.fromkeys(("q", "bias", "out", "tops", "sums"), "*fp32") | dict.fromkeys(
        ("key_scale", "key_zero", "value_scale", "value_zero"), "*fp16") | dict.fromkeys(
        ("key_data", "value_data"), "*u8")
    constants = {"ROWS": 4, "ROWS_PAD": 16, "KEY_WIDTH": width, "KEY_PAD": width, "VALUE_WIDTH": width,
                 "VALUE_PAD": width, "SIZE": 64, "AT_ONCE": triton_decode.TILE, "GROUP": 64, "KEY_BITS": bits,
                 "VALUE_BITS": bits, "KEY_ZERO": True, "VALUE_ZERO": False, "BIAS_HEADS": 1, "CAPPED": capped,
                 "PRECISION": precision}
    signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
    names = triton_decode._kernel.arg_names
    assert set(names) == set(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    source = ASTSource(triton_decode._kernel, {name: signature[name] for name in names}, constants, aligned)
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert "mma.sync" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.parametrize(("key_bits", "value_bits", "device", "new", "read"), [
    ((2, 2), (4, 4), "cuda", 1, True), ((2, 2), (4, 4), "cpu", 1, False), ((2, 2), (4, 4), "cuda", 2, False),
    ((2, 4), (4, 4), "cuda", 1, False), ((2, 2), (16, 16), "cuda", 1, False)])
def test_what_the_kernel_is_used_for(key_bits: tuple[int, int], value_bits: tuple[int, int], device: str, new: int,
                                     read: bool) -> None:
    plan = kv_plan(tiny_model("llama"))
    one = plan.layers[0].model_copy(update={"key_bits": list(key_bits), "value_bits": list(value_bits)})
    layer = SinkLayer(plan.model_copy(update={"layers": [one]}), 0)
    layer.append(*(torch.randn(1, 2, 70, 16) for _ in range(2)))
    assert not attention.kernel_reads(layer, torch.device(device), new, 4)  # nothing is packed yet
    layer.settle()
    assert attention.kernel_reads(layer, torch.device(device), new, 4) is read
