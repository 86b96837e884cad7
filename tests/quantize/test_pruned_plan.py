"""A plan that prunes, carried out: in memory and from disk to disk, alone and together with quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import weight_bytes
from families import tiny_model
from interruptions import killed
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.artifacts.heads import SilencedHead
from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to, save
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.quantize import quantize, state_of
from sinkquant.quantize.pruning import magnitude
from sinkquant.recipe import Recipe

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def small(text_file: Path) -> list[str]:
    return ["weights.group_size=32", "calibration.rows=4", "calibration.length=16", f"calibration.text={text_file}",
            "weights.scale_search=false", "weights.descent=1"]


def two_blocks(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3_text", "gpt_oss") else {}
    return tiny_model(family, dtype=dtype, num_hidden_layers=2, **kinds)


def planned(model: PreTrainedModel, assignments: list[str]) -> tuple[Plan, SinkMap, Recipe]:
    decoder, recipe = Decoder.of(model), Recipe().replace(assignments)
    sink_map = sink_map_of(decoder)
    return make_plan(decoder.shape("tiny"), sink_map, recipe), sink_map, recipe


def require_pattern(model: PreTrainedModel, plan: Plan) -> None:
    """Every pruned weight of a model has the zeros that its plan promises, and no row of pieces has more by chance."""
    for name, decision in plan.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        if decision.prune is None:
            assert (weight != 0).float().mean() > 0.75, name  # codes that round to zero
        elif decision.prune.group is None:
            assert (weight == 0).float().mean() >= decision.prune.sparsity - 0.01, name
        else:
            kept, size = decision.prune.group
            assert ((weight != 0).unflatten(1, (-1, size)).sum(-1) <= kept).all(), name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_alone_leaves_16_bits_and_plain_weights(method: str, small: list[str], tmp_path: Path) -> None:
    model = two_blocks(dtype=torch.bfloat16)
    plan, _, _ = planned(model, [*small, "weights.ignore=['*']", f"prune.method={method}", "prune.pattern=2:4",
                                 f"prune.ignore=[{DOWN}]"])
    quantize(model, plan, tiny_tokenizer())
    before = dict(two_blocks(dtype=torch.bfloat16).named_parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{name}.weight" for name in plan.modules if name != DOWN}
    for name in plan.modules:
        weight = model.get_parameter(f"{name}.weight")
        if name != DOWN:
            assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
            kept = weight != 0
            moved = (weight != before[f"{name}.weight"])[kept].float().mean()
            assert (moved > 0.5) == (method == "sparsegpt")
    if method == "magnitude":
        name = f"{next(iter(plan.modules))}.weight"
        assert torch.equal(model.get_parameter(name), magnitude(before[name], 0.5, (2, 4)).weight)
    save(model, tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == plan.weight_bytes == plan.unquantized_bytes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("more", [
    ["weights.method=rtn", "prune.method=magnitude"], ["weights.method=rtn", "prune.method=sparsegpt"],
    ["prune.method=wanda", "prune.pattern=2:4", "weights.tune=3"], ["prune.method=sparsegpt", "weights.method=gptaq"],
    ["prune.method=sparsegpt", "prune.pattern=1:4", f"weights.ignore=[{DOWN}]", f"prune.ignore=['*.q_proj', {DOWN}]"]])
def test_zeros_last_to_the_end(more: list[str], small: list[str]) -> None:
    model = two_blocks()
    plan, _, _ = planned(model, [*small, *more])
    quantize(model, plan, tiny_tokenizer())
    require_pattern(model, plan)
    assert all(0 < loss < 1 for loss in state_of(model).losses.values())


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "phi3", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_every_family_is_pruned_and_quantized(family: str, small: list[str], tmp_path: Path) -> None:
    model = two_blocks(family)
    plan, _, _ = planned(model, [*small, "prune.method=wanda", "prune.pattern=2:4"])
    quantize(model, plan, tiny_tokenizer())
    assert any(decision.prune for decision in plan.modules.values())
    for name, decision in plan.modules.items():
        if decision.prune is not None:
            weight = Decoder.of(model).weight(name)
            assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    save(model, tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == plan.weight_bytes


@pytest.mark.parametrize("more", [
    ["weights.ignore=['*.down_proj']"], ["weights.ignore=['*']", "prune.method=magnitude"]])
def test_the_same_bytes_from_memory_from_disk_and_after_an_interruption(
        more: list[str], small: list[str], tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "source", tiny_tokenizer()
    two_blocks(dtype=torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    model = load_model(source)
    plan, sink_map, recipe = planned(model, [*small, "prune.method=sparsegpt", *more])
    save(quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", sink_map, recipe)
    with killed(1):
        quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, sink_map, recipe)
    losses = quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, sink_map, recipe)
    assert losses.keys() == plan.modules.keys()
    contents = [{path.name: path.read_bytes() for path in sorted((tmp_path / place).iterdir())}
                for place in ("memory", "disk")]
    assert contents[0] == contents[1]


def test_what_sinks_weigh_changes_which_weights_go(small: list[str]) -> None:
    def kept(*more: str) -> torch.Tensor:
        model = two_blocks()
        plan, _, _ = planned(model, [*small, "weights.ignore=['*']", "prune.method=wanda", *more])
        quantize(model, plan, tiny_tokenizer())
        return torch.cat([model.get_parameter(f"{name}.weight").flatten() != 0 for name in plan.modules])

    first = kept()
    assert torch.equal(first, kept())
    assert not torch.equal(first, kept("protect.statistics=all"))


def test_the_control_is_pruned_alike_without_the_sinks(small: list[str]) -> None:
    model = two_blocks()
    plan, sink_map, recipe = planned(model, [*small, "prune.method=sparsegpt", "prune.pattern=2:4"])
    control = make_control(Decoder.of(model).shape("tiny"), sink_map, recipe, plan)
    assert control.weight_bytes == plan.weight_bytes
    assert {name: d.prune for name, d in control.modules.items()} == {name: d.prune for name, d in plan.modules.items()}
    assert control.calibration.statistics == "all"
    assert control.calibration.sinks == []


def test_a_plan_for_another_model_is_refused(small: list[str]) -> None:
    plan, _, _ = planned(tiny_model("llama"), ["weights.ignore=['*']", "prune.method=magnitude", "prune.pattern=2:4"])
    with pytest.raises(RequestError, match="which is no linear of this model"):
        quantize(tiny_model("llama", num_hidden_layers=2), plan)
    odd = tiny_model("llama", intermediate_size=126)
    with pytest.raises(RequestError, match="pattern 2:4 does not divide the 126"):
        quantize(odd, plan)


@pytest.mark.parametrize("more", [
    ["weights.method=rtn"], ["weights.tune=2"], ["prune.method=sparsegpt"], ["weights.method=gptaq"],
    ["weights.ignore=['*']", "prune.method=magnitude", "prune.ignore=['*.o_proj']"],
    ["weights.ignore=['*']", "prune.method=sparsegpt", "prune.pattern=2:4"]])
def test_silenced_heads_are_read_by_nothing(more: list[str], small: list[str], tmp_path: Path) -> None:
    source, tokenizer, output = tmp_path / "source", tiny_tokenizer(), "model.layers.1.self_attn.o_proj"
    two_blocks().save_pretrained(source)
    tokenizer.save_pretrained(source)
    model = load_model(source)
    plan, sink_map, recipe = planned(model, [*small, *more])
    head = SilencedHead(layer=1, head=2, module=output, start=32, stop=48, reason="for a test")
    plan = plan.model_copy(update={"silenced_heads": [head]})
    quantize(model, plan, tokenizer)
    weight = model.get_parameter(f"{output}.weight")
    assert not weight[:, 32:48].any()
    assert (weight[:, :32] != 0).float().mean() > 0.3
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        before = model(row).logits
        model.get_parameter("model.layers.1.self_attn.q_proj.weight")[32:48] += 1
        assert torch.equal(model(row).logits, before)
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, sink_map, recipe)
    loaded, _ = load(tmp_path / "disk")
    with torch.no_grad():
        assert torch.equal(loaded(row).logits, before)


def test_heads_of_another_model_are_refused(small: list[str]) -> None:
    model = two_blocks()
    plan, _, _ = planned(model, ["weights.method=rtn", *small])
    for module, stop in (("model.layers.1.self_attn.o_proj", 80), ("model.layers.0.self_attn.o_proj", 48)):
        head = SilencedHead(layer=1, head=2, module=module, start=32, stop=stop, reason="for a test")
        with pytest.raises(RequestError, match="silences head 2 of layer 1"):
            quantize(model, plan.model_copy(update={"silenced_heads": [head]}))
        with pytest.raises(RequestError, match="silences head 2 of layer 1"):
            accept_edited(plan.model_copy(update={"silenced_heads": [head]}), Decoder.of(model).shape("tiny"))
