"""Experts in a plan: one format for all packed ones, a layer's all packed or all dense, bytes to the byte."""

from __future__ import annotations

import pytest
from families import tiny_mixture
from sinkmaps import sink_map_of
from transformers import AutoConfig, AutoModelForCausalLM

from sinkquant.artifacts import ModelShape, Plan
from sinkquant.artifacts.experts import few_tokens, in_short, mixed_experts, require_loadable
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_control, make_plan, plan_from_shapes
from sinkquant.recipe import Recipe


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.of(tiny_mixture("qwen3_moe"))


@pytest.fixture(scope="module")
def shape(decoder: Decoder) -> ModelShape:
    return decoder.shape("tiny")


def planned(decoder: Decoder, *more: str) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", *more])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.0.mlp.experts.3.down_proj": 0.9}
                                                        if "protect.channels=module" in more else None), recipe)


def formats(plan: Plan, decoder: Decoder, block: int) -> set[tuple[int, int | None]]:
    return {(plan.modules[name].bits, plan.modules[name].group_size) for name in decoder.experts
            if decoder.block_of(name) == block}


def test_every_projection_of_every_expert_is_a_linear_of_the_shape(decoder: Decoder, shape: ModelShape) -> None:
    one = shape.linears["model.layers.1.mlp.experts.15.gate_proj"]
    assert (one.rows, one.columns, one.block, one.part_of) == (32, 64, 1, "model.layers.1.mlp.experts.gate_up_proj")
    assert len(decoder.experts) == 2 * 16 * 3
    assert sum(linear.parameters for linear in shape.linears.values() if linear.part_of) == sum(
        parameter.numel() for name, parameter in decoder.model.named_parameters() if "experts" in name)


def test_one_expert_named_raises_all_of_them_with_the_reason(decoder: Decoder) -> None:
    plan = planned(decoder, "weights.overrides=[{pattern: '*.layers.1.*.experts.7.up_proj', bits: 6}]")
    assert formats(plan, decoder, 0) == formats(plan, decoder, 1) == {(6, 32)}
    other = plan.modules["model.layers.0.mlp.experts.2.down_proj"]
    assert "transformers loads all packed experts in one format, that of model.layers.1.mlp.experts.7.up_proj" in (
        other.reason)
    assert plan.modules["model.layers.0.self_attn.q_proj"].bits == 4


def test_one_expert_in_16_bits_leaves_its_layer_there(decoder: Decoder) -> None:
    plan = planned(decoder, "weights.ignore=['*.layers.1.*.experts.7.up_proj']")
    assert formats(plan, decoder, 0) == {(4, 32)}
    assert formats(plan, decoder, 1) == {(16, None)}
    assert "all packed or all dense" in plan.modules["model.layers.1.mlp.experts.2.down_proj"].reason
    assert plan.loads_in == ["transformers"]


def test_a_single_expert_is_not_protected_by_what_the_sinks_do_to_it(decoder: Decoder) -> None:
    plan = planned(decoder, "protect.channels=module")
    assert formats(plan, decoder, 0) == {(4, 32)}


def test_a_budget_raises_experts_together(decoder: Decoder, shape: ModelShape) -> None:
    plan = planned(decoder, "budget.bits=8")
    assert len(formats(plan, decoder, 0)) == 1
    assert formats(plan, decoder, 0) == formats(plan, decoder, 1) > set()
    assert plan.bits_per_weight <= 8
    control = make_control(shape, sink_map_of(decoder), Recipe().replace(["weights.group_size=32"]), plan)
    assert mixed_experts(shape, {name: decision.form for name, decision in control.modules.items()}) is None
    assert formats(control, decoder, 0) != {(4, 32)}


def test_experts_read_16_bits_where_other_inputs_are_rounded(decoder: Decoder) -> None:
    plan = planned(decoder, "activations.format=int8", "weights.bits=8", "weights.group_size=-1", "weights.method=rtn")
    assert plan.modules["model.layers.0.self_attn.q_proj"].activations == "int8"
    assert {plan.modules[name].activations for name in decoder.experts} == {"16-bit"}
    edited = plan.model_copy(deep=True)
    for name in decoder.experts:
        edited.modules[name].activations, edited.modules[name].activation_scale = "int8", "token"
    with pytest.raises(RequestError, match="rounds the inputs of the expert"):
        accept_edited(edited, decoder.shape("tiny"))


def test_edited_plans_are_held_to_it(decoder: Decoder, shape: ModelShape) -> None:
    plan = planned(decoder)
    edited = plan.model_copy(deep=True)
    edited.modules["model.layers.1.mlp.experts.7.up_proj"].bits = 5
    with pytest.raises(RequestError, match="different formats, but transformers loads all packed experts in one"):
        accept_edited(edited, shape)
    for name in decoder.experts:
        edited.modules[name].bits = 5
    assert accept_edited(edited, shape).weight_bytes > plan.weight_bytes


def test_groups_that_do_not_divide_an_experts_columns_are_refused(decoder: Decoder) -> None:
    with pytest.raises(RequestError, match=r"does not divide the 32 input columns of .*experts\.0\.down_proj"):
        planned(decoder, "weights.group_size=64")


def test_counts_in_words() -> None:
    tokens = {"a": [5, 300], "b": [400, 256]}
    assert few_tokens(tokens, 256) == "a 0 (5)"
    assert few_tokens(tokens, 0) == ""
    assert in_short([3, 4]) == "3 4"
    assert in_short(list(range(33))) == "0 to 32, 16 in the median of 33"


def test_llama_4_is_refused_where_transformers_loads_it_into_other_experts() -> None:
    config = AutoConfig.for_model(
        "llama4_text", vocab_size=128, hidden_size=64, intermediate_size=32, intermediate_size_mlp=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4)
    decoder = Decoder.of(AutoModelForCausalLM.from_config(config))
    nf4 = ["weights.format=nf4", "weights.group_size=64"]
    for backend, more in (("compressed-tensors", []), ("bitsandbytes", nf4)):
        assert backend in decoder.shape("tiny").not_loaded_from
        with pytest.raises(RequestError, match=f"cannot be packed in the format of {backend}: transformers loads"):
            planned(decoder, f"backend={backend}", "weights.method=rtn", *more)
    allowed = planned(decoder, "backend=gptq", "weights.method=rtn")
    changed = allowed.model_copy(update={"modules": {
        name: one.model_copy(update={"storage": "pack-quantized"}) for name, one in allowed.modules.items()}})
    with pytest.raises(RequestError, match="cannot be packed in the format of compressed-tensors"):
        require_loadable(decoder.shape("tiny"), changed.formats, own=False)
    require_loadable(decoder.shape("tiny"), changed.formats, own=True)
    assert not Decoder.of(tiny_mixture("qwen3_moe")).shape("x").not_loaded_from


def test_pruning_experts_asks_for_detection(decoder: Decoder, shape: ModelShape) -> None:
    """It says which of them make the massive activations and are spared."""
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "prune.method=magnitude"])
    assert plan_from_shapes(shape, recipe) == (None, ["prune.method"])
    assert plan_from_shapes(shape, recipe.replace(["prune.massive=true"]))[1] == []
