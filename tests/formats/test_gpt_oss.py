"""gpt-oss from disk to disk: attention is packed, fused experts stay as they are, plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, model_folder
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import load_model, open_model
from sinkquant.quantize import quantize


def test_a_run_packs_the_attention_and_leaves_the_experts(text_file: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source", "gpt_oss", torch.bfloat16)
    before = load_file(source / "model.safetensors")
    rows = torch.randint(8, 128, (2, 70), generator=torch.Generator().manual_seed(0))  # longer than the window
    expected = []
    for method in ("rtn", "gptq"):
        recipe = sq.Recipe.load("w4a16-sink").replace([
            *SMALL, f"weights.method={method}", f"calibration.text={text_file}", "weights.descent=0",
            "evaluate.skip=true", "detect.super_weights=false"])
        sq.run(recipe, source, tmp_path / method)
        plan = Plan.load(tmp_path / method / "plan.json")
        written = load_file(tmp_path / method / "model" / "model.safetensors")
        for name, decision in plan.modules.items():
            if ".experts." in name:
                assert decision.bits == 16
                assert decision.reason.startswith("left in 16 bits, fused experts: plain transformers loads")
                assert torch.equal(written[name], before[name])
            elif "router" in name:
                assert decision.reason.startswith("left in 16 bits, router")
            else:
                assert (decision.bits, decision.method) == (4, method)
                assert f"{name}.weight_packed" in written
                assert torch.equal(written[f"{name}.bias"], before[f"{name}.bias"])
        assert sum(name.endswith("weight_packed") for name in written) == 3 * 4  # q, k, v and o of three layers
        assert torch.equal(written["model.layers.0.self_attn.sinks"], before["model.layers.0.self_attn.sinks"])
        kinds = {token.kind for token in sq.SinkMap.load(tmp_path / method / "sinkmap.json").tokens}
        assert kinds <= {"learned"}
        model = quantize(load_model(source), plan, tiny_tokenizer())
        with torch.no_grad():
            expected.append(model(rows, use_cache=False).logits)
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / method / "model")
            assert torch.equal(plain(rows, use_cache=False).logits, expected[-1])
    assert not torch.equal(*expected)


def test_experts_that_are_packed_already_are_refused(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source", "gpt_oss", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(RequestError, match="is quantized as 'mxfp4'; start from the unquantized model"):
        open_model(source)
