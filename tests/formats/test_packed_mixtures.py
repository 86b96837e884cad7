"""sq.load(folder, packed=True) of mixtures: every expert stays packed, and none is dense while it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import distance, logits
from families import tiny_mixture
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load, save
from sinkquant.formats.save import linear_tensors
from sinkquant.inference import KernelLinear
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.quantize import PackedWeight, quantize
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs.packed import group_scales, to_codes

ROWS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
LEFT = "left in 16 bits by the checkpoint"


def written(folder: Path, family: str, *more: str, **overrides: Any) -> tuple[Path, Plan]:
    """The checkpoint of a tiny mixture of 16 experts, in 4 bits in groups of 32 where `more` says nothing else."""
    model = tiny_mixture(family, dtype=torch.bfloat16, **overrides)
    decoder = Decoder.of(model)
    recipe = Recipe().replace(["weights.method=rtn", "weights.group_size=32", "weights.descent=0",
                               "weights.scale_search=false", *more])
    plan = make_plan(decoder.shape(family), sink_map_of(decoder), recipe)
    return save(quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), folder / "out"), plan


def held(model: PreTrainedModel) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def fused(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


@pytest.mark.parametrize(("family", "more"), [
    ("mixtral", ("weights.bits=8", "weights.group_size=-1")), ("qwen3_moe", ()),
    # Attention in 8 bits, shared experts in 2; a first layer without experts.
    ("deepseek_v3", ("weights.overrides=[{pattern: '*shared*', bits: 2}, {pattern: '*self_attn*', bits: 8}]",)),
    ("qwen2_moe", ("weights.bits=3",)), ("olmoe", ("weights.bits=6",))])
def test_experts_give_the_logits_of_their_dense_weights(tmp_path: Path, family: str, more: tuple[str, ...],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    out, plan = written(tmp_path, family, *more)
    dense = load(out)[0]
    with monkeypatch.context() as patch:  # what transformers unpacks experts with
        patch.delattr(CompressedTensorsDequantize, "convert")
        model = load(out, packed=True)[0]
    found = sq.packing(model)
    assert set(found.kernels) == set(plan.formats) > set(Decoder.of(dense).experts)
    assert not fused(model)
    assert set(found.dense.values()) == {LEFT}
    assert not [name for name in found.dense if ".experts." in name]
    assert distance(model, dense, ROWS) < 0.03
    assert distance(model, dense, ROWS.repeat(100, 1)) < 0.03  # enough tokens to make an expert's weights dense
    linears = [module for module in model.modules() if isinstance(module, KernelLinear)]
    weights = sum(module.in_features * module.out_features + (module.bias is not None) * module.out_features
                  for module in linears)
    assert found.linear_bfloat16_bytes == 2 * weights
    assert found.bytes == held(model)
    assert found.bfloat16_bytes == held(dense)


def test_greedy_steps_with_a_cache_are_those_of_whole_rows(tmp_path: Path) -> None:
    model = load(written(tmp_path, "qwen3_moe")[0], packed=True)[0]
    made = model.generate(ROWS, attention_mask=torch.ones_like(ROWS), max_new_tokens=6, do_sample=False)
    whole = logits(model, made[:, :-1])[:, ROWS.shape[1] - 1:]
    best = whole.max(-1).values
    chosen = whole.gather(-1, made[:, ROWS.shape[1]:, None])[..., 0]
    assert (best - chosen < 0.02 * best.abs()).all()  # a last bit may decide between two tokens


def test_a_layer_whose_experts_are_in_16_bits(tmp_path: Path) -> None:
    out, plan = written(tmp_path, "qwen3_moe", "weights.ignore=['*layers.1.*.experts.*']")
    model, dense = load(out, packed=True)[0], load(out)[0]
    found = sq.packing(model)
    assert set(found.kernels) == set(plan.formats)
    assert fused(model) == [f"model.layers.1.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")]
    assert found.dense == dict.fromkeys([*fused(model), "lm_head"], LEFT)
    assert distance(model, dense, ROWS) < 0.03
    assert found.bytes == held(model) < held(dense)


def test_experts_that_are_all_in_16_bits_stay_as_transformers_has_them(tmp_path: Path) -> None:
    out, plan = written(tmp_path, "mixtral", "weights.ignore=['*.experts.*']")
    model, dense = load(out, packed=True)[0], load(out)[0]
    assert set(sq.packing(model).kernels) == set(plan.formats)
    assert sq.packing(model).dense == dict.fromkeys([*fused(dense), "lm_head"], LEFT)
    assert fused(model) == fused(dense)
    assert distance(model, dense, ROWS) < 0.03


FORMATS = {"re:.*experts.3.w2$": WeightFormat(8, -1), "re:.*experts.4.w1$": WeightFormat(4, 16),
           "re:.*experts.5.w3$": WeightFormat(8, -1, inputs="int8", input_scale="token"),
           "Linear": WeightFormat(4, 32)}
"""Targets of a checkpoint that formats its experts one by one, which plain transformers does not load."""


def foreign(folder: Path) -> PreTrainedModel:
    """Write a Mixtral under the names that its own checkpoints have, packed by class, as other tools do: one expert is
    in 16 bits, projections of others in 8, once with inputs in 8 bits too, and one in groups that no kernel takes; all
    of the second layer are in 16 bits. Returns the model that it is, without rounded inputs."""
    model = tiny_mixture("mixtral", dtype=torch.bfloat16)
    decoder = Decoder.of(model)
    tensors: dict[str, torch.Tensor] = {}
    linears = [name for name in (*decoder.linears, *decoder.experts)
               if ".experts.7." not in name and ".1.mlp.experts" not in name]
    for name in linears:
        form = next(form for target, form in FORMATS.items() if target == "Linear" or name.endswith(target[5:-1]))
        scale = group_scales(decoder.weight(name), form.bits, form.group_size or -1, torch.bfloat16)
        packed = PackedWeight(to_codes(decoder.weight(name), scale, form.bits), scale, form.bits)
        tensors |= linear_tensors(name, packed, form)
        decoder.put(name, packed.dequantized(torch.bfloat16))
    model.save_pretrained(folder)
    others = {key.replace(".block_sparse_moe.", ".mlp."): tensor
              for key, tensor in load_file(folder / "model.safetensors").items()}
    assert len(others) == 2 * (16 * 3 + 7) + 3
    tensors |= {key: tensor for key, tensor in others.items() if key.removesuffix(".weight") not in linears}
    save_file({key.replace(".mlp.", ".block_sparse_moe."): tensor.contiguous() for key, tensor in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*experts.7.*", "re:.*layers.1.*experts.*"],
        "config_groups": {f"group_{i}": _group(target, form) for i, (target, form) in enumerate(FORMATS.items())}}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return model


def _group(target: str, form: WeightFormat) -> dict[str, Any]:
    strategy, size = ("channel", None) if form.group_size == -1 else ("group", form.group_size)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": [target], "format": scheme_of(form).layout(form),
            "input_activations": inputs if form.input_scale else None,
            "weights": {"num_bits": form.bits, "type": "int", "symmetric": True, "strategy": strategy,
                        "group_size": size}}


def test_experts_of_other_tools_may_each_have_a_format(tmp_path: Path) -> None:
    dense = foreign(tmp_path)
    model = load(tmp_path, packed=True)[0]
    found = sq.packing(model)
    owner = "model.layers.0.mlp.experts"
    assert found.kernels[f"{owner}.3.w2"] == "int8"
    assert found.kernels[f"{owner}.3.w1"] == "int4"
    assert found.kernels[f"{owner}.5.w3"] == "int8"
    rounded = [name for name, module in model.named_modules() if name and module._forward_pre_hooks]
    assert rounded == [f"{owner}.5.w3"]
    assert set(found.dense) == {"lm_head", f"{owner}.4.w1", *(f"{owner}.7.w{i}" for i in (1, 2, 3)), *fused(model)}
    assert fused(model) == [f"model.layers.1.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")]
    assert "group size 16" in found.dense[f"{owner}.4.w1"]
    assert found.dense[f"{owner}.7.w2"] == LEFT
    assert distance(model, dense, ROWS) < 0.03


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    out = written(tmp_path, "mixtral")[0]
    tensors = load_file(out / "model.safetensors")
    gone = "model.layers.1.mlp.experts.9.w3.weight_packed"
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, out / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks the tensor model\.layers\.1\.mlp\.experts\.9\.w3"):
        load(out, packed=True)


def test_experts_are_offloaded_to_the_disk(tmp_path: Path) -> None:
    out = written(tmp_path, "qwen3_moe")[0]
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}
    whole = load(out, packed=True)[0]
    model = load(out, packed=True, device_map=where, offload_folder=tmp_path / "offload")[0]
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert len(list(experts.buffers())) == 16 * 3 * 2
    assert all(buffer.is_meta for buffer in experts.buffers())
    assert torch.equal(logits(model, ROWS), logits(whole, ROWS))
    solved = load(out, packed=True, device_map="auto", max_memory={"cpu": 120_000}, offload_folder=tmp_path / "auto")[0]
    assert "disk" in solved.hf_device_map.values()
    assert torch.equal(logits(solved, ROWS), logits(whole, ROWS))
    with pytest.raises(RequestError, match="packed for the CPU to 0"):
        load(out, packed=True, device_map={"": 0})
