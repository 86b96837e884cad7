"""Every family, quantized and saved, gives the same logits in a process that knows transformers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import plain_logits, quantized, weight_bytes
from families import FAMILIES, tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer

from sinkquant.formats import save
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = [32, 64, -1]
QUANTIZABLE = [family for family in FAMILIES if family != "gpt2"]  # Conv1D takes the format of test_own.py


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    bits: int
    group: int
    dtype: torch.dtype
    more: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)


CASES = [Case(family, method, 2 + (2 * i + j) % 7, GROUPS[(i + j) % 3], DTYPES[(i // 3 + j) % 3])
         for i, family in enumerate(QUANTIZABLE) for j, method in enumerate(("rtn", "gptq", "gptaq"))]
CASES += [
    Case("llama", "rtn", 8, -1, torch.float32, overrides={"tie_word_embeddings": True}),
    Case("gemma2", "rtn", 4, 32, torch.bfloat16, overrides={"tie_word_embeddings": False}),
    # Several formats at once, one of them "left alone".
    Case("llama", "rtn", 3, 64, torch.bfloat16, ("weights.overrides=[{pattern: '*.o_proj', bits: 7, group_size: -1}, "
                                                 "{pattern: '*.1.*.q_proj', bits: 5}, "
                                                 "{pattern: '*.2.*.down_proj', bits: 16}]",)),
    # 3 bits of 96 columns do not fill whole words.
    Case("llama", "rtn", 3, 32, torch.float32, overrides={"hidden_size": 96, "intermediate_size": 224,
                                                          "num_attention_heads": 6})]


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def results(rows: torch.Tensor, text_file: Path,
            tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(logits in memory, logits in the other process, bytes planned, bytes on disk) of every case."""
    work = tmp_path_factory.mktemp("round_trip")
    expected, sizes, folders = [], [], []
    for index, case in enumerate(CASES):
        model, plan, sink_map = quantized(text_file, case.family, case.method, case.bits, case.group, case.dtype,
                                          case.more, **case.overrides)
        folders.append(save(model, tiny_tokenizer(), work / str(index), sink_map))
        sizes.append((plan.weight_bytes, weight_bytes(folders[-1])))
        with torch.no_grad():
            expected.append(model(rows, use_cache=False).logits)
    found = plain_logits(rows, folders, work)
    return [(one, found[i], *sizes[i]) for i, one in enumerate(expected)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c.family}-{c.method}-{c.bits}-{c.group}" for c in CASES])
def test_plain_transformers_gives_the_same_logits_and_the_plan_the_size(
        index: int, results: list[tuple[torch.Tensor, torch.Tensor, int, int]]) -> None:
    expected, found, planned, on_disk = results[index]
    assert found.dtype == expected.dtype == CASES[index].dtype
    assert torch.equal(found, expected)
    assert planned == on_disk


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "qwen3_moe"])
def test_bytes_per_weight_are_those_of_the_packed_and_the_dense_tensors(family: str, dtype: torch.dtype,
                                                                        text_file: Path) -> None:
    model, plan, _ = quantized(text_file, family, "rtn", 3, 32, dtype)
    weights = 0
    for name, decision in plan.modules.items():
        tensor = Decoder.of(model).weight(name)
        weights += tensor.numel()
        if decision.bits == 16:
            assert decision.bytes == tensor.numel() * tensor.element_size()
        else:
            groups = tensor.shape[1] // 32
            words = -(-tensor.shape[1] * 3 // 32)
            scale = tensor.element_size() if ".experts." in name else 2
            assert decision.bytes == tensor.shape[0] * (4 * words + scale * groups) + 16
    total = sum(decision.bytes for decision in plan.modules.values())
    assert plan.bits_per_weight == pytest.approx(8 * total / weights)


def test_fused_experts_with_biases_stay_in_16_bits_with_the_reason() -> None:
    decoder = Decoder.of(tiny_model("gpt_oss"))
    plan = make_plan(decoder.shape("gpt_oss"), sink_map_of(decoder), Recipe())
    experts = [decision for name, decision in plan.modules.items() if ".experts." in name]
    assert experts
    for decision in experts:
        assert decision.bits == 16
        assert decision.reason.startswith("left in 16 bits, fused experts: plain transformers loads")
