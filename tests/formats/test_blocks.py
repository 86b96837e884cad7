"""Checkpoints of floating-point weights in blocks: planned bytes, plain transformers, sinkquant's own reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import weight_bytes
from families import tiny_model
from safetensors.torch import load_file
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load, load_dense, open_checkpoint, save
from sinkquant.models import Decoder
from sinkquant.policy import make_control, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

NAMES = ["nvfp4a16-sink", "nvfp4-sink", "mxfp4a16-sink", "mxfp4-sink"]
MXFP8 = ["weights.format=mxfp8", "weights.bits=8", "weights.group_size=32", "weights.method=rtn",
         "activations.format=mxfp8", "activations.scale=group"]
ROWS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def recipe_of(name: str, text: Path, *more: str) -> Recipe:
    base = Recipe().replace(MXFP8) if name == "mxfp8" else Recipe.load(name)
    return base.replace(["weights.overrides=[{pattern: '*.2.*', bits: 16}]", "calibration.rows=4",
                         "calibration.length=16", f"calibration.text={text}", *more])


def planned(name: str, text: Path, *more: str, **config: object) -> tuple[PreTrainedModel, Plan]:
    model = tiny_model("llama", dtype=torch.bfloat16, **config)
    decoder = Decoder.of(model)
    return model, make_plan(decoder.shape("llama"), sink_map_of(decoder), recipe_of(name, text, *more))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS, use_cache=False).logits


@pytest.mark.parametrize("name", [*NAMES, "mxfp8"])
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(name: str, text_file: Path, tmp_path: Path) -> None:
    model, plan = planned(name, text_file)
    before = logits(model)
    quantize(model, plan, tiny_tokenizer())
    expected = logits(model)
    assert 1e-6 < float((expected - before).float().square().mean() / before.float().square().mean()) < 0.2
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(folder) == plan.weight_bytes
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(load(folder)[0]), expected)
    # In float32, which evaluation computes in, the weights are those that bfloat16 has.
    wide = load_dense(folder, torch.float32)
    assert wide.dtype == torch.float32
    assert all(torch.equal(tensor.to(torch.bfloat16), model.state_dict()[key]) for key, tensor in
               wide.state_dict().items())
    assert torch.isfinite(logits(wide)).all()
    # Read block by block from the disk, weights and inputs are the same again.
    mine, dense = Decoder.of(open_checkpoint(folder)), load_dense(folder).state_dict()
    with mine.present([mine.model]):
        assert all(torch.equal(dense[key], tensor) for key, tensor in mine.model.state_dict().items())
        assert torch.equal(logits(mine.model), expected)


def test_the_scales_over_blocks_are_shared_by_what_engines_fuse(text_file: Path, tmp_path: Path) -> None:
    model, plan = planned("nvfp4-sink", text_file, "weights.smooth=none")
    largest = max(float(model.get_parameter(f"model.layers.0.self_attn.{role}_proj.weight").detach().abs().max())
                  for role in "qkv")
    folder = save(quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    for leaf in ("weight_global_scale", "input_global_scale"):
        query, key, value, output = (stored[f"model.layers.0.self_attn.{role}_proj.{leaf}"] for role in "qkvo")
        assert query == key == value != output
        assert (query.dtype, query.shape) == (torch.float32, (1,))
    # The largest weight of the three gets the code 4 under the largest FP8 number.
    assert float(stored["model.layers.0.self_attn.q_proj.weight_global_scale"]) == pytest.approx(448 * 4 / largest)


def test_ranges_without_the_sinks_leave_linears_with_inputs_of_16_bits(text_file: Path) -> None:
    decoder = Decoder.of(tiny_model("llama", dtype=torch.bfloat16))
    name = "model.layers.1.mlp.down_proj"
    sink_map = sink_map_of(decoder, {name: 0.9})
    recipe = recipe_of("nvfp4-sink", text_file, "activations.sinks=16-bit")
    plan = make_plan(decoder.shape("llama"), sink_map, recipe)
    assert (plan.modules[name].bits, plan.modules[name].activations) == (4, "16-bit")
    assert "its inputs stay in 16 bits: sinks set their range" in plan.modules[name].reason
    control = make_control(decoder.shape("llama"), sink_map, recipe, plan)
    assert control.modules[name].activations == "nvfp4"
    assert control.weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)


@pytest.mark.parametrize(("name", "settings", "config", "message"), [
    ("nvfp4a16-sink", [], {"intermediate_size": 72}, "NVFP4 weights have blocks of 16, which do not divide the 72 "
     r"input columns of model\.layers\.0\.mlp\.down_proj; leave it alone"),
    ("mxfp4-sink", [], {"intermediate_size": 80}, "MXFP4 weights have blocks of 32, which do not divide the 80"),
    ("nvfp4a16-sink", ["activations.format=int8"], {}, "NVFP4 weights are multiplied with inputs in 16-bit or nvfp4, "
     "not in int8"),
    ("nvfp4-sink", ["weights.format=int"], {}, "multiplied with inputs in 16-bit or int8 .* not in nvfp4"),
    ("nvfp4-sink", ["activations.scale=token"], {}, "nvfp4 has a scale per group, not per token"),
    ("nvfp4a16-sink", ["weights.bits=3"], {}, r"weights\.bits is 3, and NVFP4 weights have 4 bits"),
    ("mxfp4a16-sink", ["protect.channels=module"], {}, r"protect\.bits is 8, and MXFP4 .* have 4 bits, or stay in 16"),
    ("mxfp4a16-sink", ["weights.group_size=64"], {}, r"weights\.group_size is 64, and MXFP4 weights have blocks of 32"),
    ("mxfp8", ["weights.tune=4"], {}, "MXFP8 weights are not tuned"),
    ("mxfp4a16-sink", ["backend=quanto"], {}, r"weights\.format 'mxfp4' is not held by the backend quanto")])
def test_what_blocks_do_not_have_is_refused_before_anything(
        name: str, settings: list[str], config: dict[str, int], message: str, text_file: Path) -> None:
    with pytest.raises(RequestError, match=message):
        planned(name, text_file, *settings, **config)


def test_a_model_that_transformers_could_not_run_is_refused(text_file: Path) -> None:
    decoder = Decoder.of(tiny_model("llama"))
    with pytest.raises(RequestError, match="NVFP4 weights in models of bfloat16 alone, and the tensors of this one are "
                                           "float32; save it in bfloat16 first"):
        make_plan(decoder.shape("llama"), sink_map_of(decoder), recipe_of("nvfp4a16-sink", text_file))


def test_experts_stay_in_16_bits(text_file: Path) -> None:
    decoder = Decoder.of(tiny_model("qwen3_moe", dtype=torch.bfloat16))
    plan = make_plan(decoder.shape("qwen3_moe"), sink_map_of(decoder), recipe_of("mxfp4a16-sink", text_file))
    experts = [decision for name, decision in plan.modules.items() if ".experts." in name]
    assert {decision.bits for decision in experts} == {16}
    assert any("transformers unpacks no experts in MXFP4 weights" in decision.reason for decision in experts)
    assert plan.modules["model.layers.0.self_attn.q_proj"].bits == 4
