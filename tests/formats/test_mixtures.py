"""Mixtures of 16 experts: plain transformers gives the logits of the quantized model, a resumed run the same bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import plain_logits, weight_bytes
from families import MIXTURES, tiny_mixture
from interruptions import killed
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.artifacts.experts import few_tokens
from sinkquant.formats import load_dense, quantize_to, save
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

QUICK = ["weights.group_size=32", "weights.descent=0", "weights.scale_search=false", "calibration.rows=4",
         "calibration.length=16"]


@dataclass(frozen=True)
class Case:
    family: str
    dtype: torch.dtype
    more: tuple[str, ...]
    layers: int = 2


CASES = [
    Case("mixtral", torch.bfloat16, ("weights.method=gptq", "weights.bits=3"), 1),
    Case("qwen3_moe", torch.float32, ("weights.method=gptq", "weights.group_size=-1"), 1),
    Case("qwen2_moe", torch.float16, ("weights.method=rtn", "weights.bits=5")),
    Case("olmoe", torch.bfloat16, ("weights.method=rtn", "weights.bits=8")),
    # A first layer without experts; shared experts in another format than the routed ones.
    Case("deepseek_v3", torch.bfloat16, ("weights.method=rtn", "weights.overrides=[{pattern: '*shared*', bits: 2}]")),
    # The experts of one layer stay as they are.
    Case("qwen3_moe", torch.bfloat16, ("weights.method=rtn", "weights.ignore=['*layers.1.*.experts.*']"))]


def planned(model: PreTrainedModel, text: Path, *more: str) -> Plan:
    decoder = Decoder.of(model)
    recipe = Recipe().replace([*QUICK, f"calibration.text={text}", *more])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)


def test_plain_transformers_gives_the_same_logits_and_the_plan_the_size(text_file: Path, tmp_path: Path) -> None:
    rows = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = []
    for index, case in enumerate(CASES):
        model = tiny_mixture(case.family, dtype=case.dtype, num_hidden_layers=case.layers)
        plan = planned(model, text_file, *case.more)
        packed = [name for name in Decoder.of(model).experts if plan.modules[name].bits < 16]
        assert len(packed) == 48 * (2 if index in (2, 3) else 1)
        save(quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / str(index))
        assert weight_bytes(tmp_path / str(index)) == plan.weight_bytes
        with torch.no_grad():
            expected.append(model(rows, use_cache=False).logits)
    found = plain_logits(rows, [tmp_path / str(index) for index in range(len(CASES))], tmp_path)
    for index, one in enumerate(expected):
        assert torch.equal(found[index], one), CASES[index]


@pytest.mark.parametrize(("family", "more"), [
    ("mixtral", ["weights.method=rtn"]), ("qwen3_moe", ["weights.method=rtn", "weights.rotate=full"]),
    ("qwen3_moe", ["weights.method=gptq"]),
    ("olmoe", ["prune.method=wanda", "weights.method=rtn", "weights.ignore=['*.0.*.experts.*']"])])
def test_the_same_bytes_from_memory_from_disk_and_after_an_interruption(
        family: str, more: list[str], text_file: Path, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "source", tiny_tokenizer()
    tiny_mixture(family, dtype=torch.bfloat16).save_pretrained(source)  # one tensor per expert
    tokenizer.save_pretrained(source)
    model = load_model(source)
    plan = planned(model, text_file, *more)
    assert planned(open_model(source), text_file, *more) == plan
    save(quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", plan.sink_map)
    with killed(1):
        quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, plan.sink_map)
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, plan.sink_map)
    for path in (tmp_path / "memory").iterdir():
        assert (tmp_path / "disk" / path.name).read_bytes() == path.read_bytes(), path.name
    content = json.loads((tmp_path / "disk" / "sinkquant.json").read_text())
    if plan.needs_rows:
        tokens = content["expert_tokens"]
        assert {owner: sum(counts) for owner, counts in tokens.items()} == {
            f"model.layers.{i}.mlp.experts": 2 * 4 * 16 for i in range(2)}
        assert few_tokens(tokens, 256).count("(") == 32
    else:
        assert "expert_tokens" not in content


@pytest.mark.parametrize("more", [[], ["weights.distill=1"]])
def test_experts_in_16_bits_are_read_back_with_the_scales_of_their_channels(
        more: list[str], text_file: Path, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "source", tiny_tokenizer()
    tiny_mixture("qwen2_moe", dtype=torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    model = load_model(source)
    plan = planned(model, text_file, "weights.smooth=awq", "weights.method=rtn", "weights.ignore=['*.experts.*']",
                   *more)
    save(quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory")
    with killed(1):
        quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer)
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer)
    one, other = (tmp_path / name / "model.safetensors" for name in ("memory", "disk"))
    assert one.read_bytes() == other.read_bytes()


def test_the_log_says_how_many_tokens_went_where(text_file: Path, tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    source, tokenizer = tmp_path / "source", tiny_tokenizer()
    tiny_mixture("qwen3_moe").save_pretrained(source)
    plan = planned(open_model(source), text_file, "weights.ignore=['*self_attn*']", "calibration.min_expert_tokens=4")
    with caplog.at_level("INFO", "sinkquant"):
        quantize_to(tmp_path / "out", open_model(source), plan, tokenizer, plan.sink_map)
    said = [record.getMessage() for record in caplog.records if record.name == "sinkquant"]  # libraries warn too
    tokens = json.loads((tmp_path / "out" / "sinkquant.json").read_text())["expert_tokens"]
    for place, counts in enumerate(tokens.values()):
        assert f"tokens per expert of mlp.experts {' '.join(map(str, counts))}" in said[place]
        named = [f"{i} ({count})" for i, count in enumerate(counts) if count < 4]
        assert ("as if all tokens went there" in said[place]) == bool(named)
        assert all(name in said[place] for name in named)


def test_a_checkpoint_loads_in_another_dtype_too(text_file: Path, tmp_path: Path) -> None:
    model = tiny_mixture("qwen3_moe", dtype=torch.bfloat16)
    save(quantize(model, planned(model, text_file, "weights.method=rtn"), tiny_tokenizer()), tiny_tokenizer(),
         tmp_path / "out")
    wide = load_dense(tmp_path / "out", torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    for name, part in Decoder.of(wide).experts.items():
        assert torch.equal(part.weight, Decoder.of(model).weight(name).float())


def test_a_quantized_mixture_can_be_walked_through_from_disk(text_file: Path, tmp_path: Path) -> None:
    model = tiny_mixture("mixtral", dtype=torch.bfloat16)
    save(quantize(model, planned(model, text_file, "weights.method=rtn"), tiny_tokenizer()), tiny_tokenizer(),
         tmp_path / "out")
    decoder = Decoder.of(open_model(tmp_path / "out"))
    with decoder.present(decoder.blocks):
        for name in decoder.experts:
            assert torch.equal(decoder.weight(name), Decoder.of(model).weight(name))


def test_experts_beside_a_tower_are_named_as_vllm_names_them_too(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
    model = Glm4vMoeForConditionalGeneration._from_config(Glm4vMoeConfig(
        text_config={"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                     "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "rope_parameters": rope,
                     "first_k_dense_replace": 1, "max_position_embeddings": 256, "pad_token_id": 0},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32}))
    decoder = Decoder.of(model.eval())
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), Recipe().replace([*QUICK, "weights.method=rtn"]))
    out = save(quantize(model, plan), tiny_tokenizer(), tmp_path / "out")
    (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    (pattern,) = (target[3:] for target in group["targets"] if target.startswith("re:"))
    found = [re.match(pattern, f"{owner}.layers.1.mlp.experts.3.up_proj") is not None for owner in (
        "model.language_model", "language_model.model", "model.visual", "visual", "mtp")]
    assert found == [True, True, False, False, False]


def test_every_mixture_is_known() -> None:
    for family in MIXTURES:
        assert len(Decoder.of(tiny_mixture(family)).experts) == 48 * (1 if family == "deepseek_v3" else 2)
