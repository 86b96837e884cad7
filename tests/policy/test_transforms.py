"""Transforms in a plan: what a recipe asks for, what it adds in bytes, and what a model does not allow."""

from __future__ import annotations

import pytest
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan, Transform
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.recipe import Recipe

RECIPE = Recipe().replace(["weights.group_size=32"])


Q, K, DOWN, OUT = (f"model.layers.1.{leaf}" for leaf in (
    "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "self_attn.o_proj"))


def planned(decoder: Decoder, *changes: str, energies: dict[str, float] | None = None) -> Plan:
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, energies), RECIPE.replace(changes))


def test_a_plan_without_transforms_is_what_it_was() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    assert planned(decoder).transforms == []
    assert planned(decoder, "weights.method=rtn").needs_rows is False


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_rotation_unties_the_head_and_its_bytes_are_counted(tied: bool) -> None:
    decoder = Decoder.of(tiny_model("llama", tie_word_embeddings=tied))
    plain, values, full = (planned(decoder, f"weights.rotate={scope}") for scope in ("none", "values", "full"))
    assert values.transforms == [Transform(name="rotate", scope="values")]
    assert values.weight_bytes == plain.weight_bytes
    head = 128 * 64 * 4
    assert (full.weight_bytes - plain.weight_bytes >= head) == tied
    assert full.unquantized_bytes == plain.unquantized_bytes
    control = make_control(decoder.shape("tiny"), sink_map_of(decoder), RECIPE.replace(["weights.rotate=full"]), full)
    assert control.transforms == full.transforms
    again = accept_edited(Plan.parse(full.model_dump(mode="json", by_alias=True), "it"), decoder.shape("tiny"))
    assert (again.transforms, again.weight_bytes) == (full.transforms, full.weight_bytes)


def test_what_the_model_does_not_allow_is_refused_with_the_reason() -> None:
    decoder = Decoder.of(tiny_model("gemma2"))
    assert planned(decoder, "weights.rotate=values").transforms
    with pytest.raises(RequestError, match=r"post_attention_layernorm scales every channel.*set weights.rotate=values"):
        planned(decoder, "weights.rotate=full")
    edited = planned(decoder).model_copy(update={"transforms": [Transform(name="rotate", scope="full")]})
    with pytest.raises(RequestError, match="not possible in Gemma2ForCausalLM"):
        accept_edited(edited, decoder.shape("tiny"))


def test_a_gate_on_channels_that_a_rotation_spreads_is_refused() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    with pytest.raises(RequestError, match="min_massive_overlap compares channels"):
        planned(decoder, "weights.rotate=full", "gate.min_massive_overlap=0.5")
    assert planned(decoder, "weights.rotate=values", "gate.min_massive_overlap=0.5").transforms


def test_smoothing_takes_rows_and_says_so() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    plan = planned(decoder, "weights.method=rtn", "weights.rotate=values", "weights.smooth=smoothquant",
                   "weights.smooth_strength=0.7")
    assert [transform.name for transform in plan.transforms] == ["rotate", "smoothquant"]
    assert plan.transforms[1].strength == 0.7
    assert plan.needs_rows
    assert planned(decoder, "weights.smooth=awq").transforms == [Transform(name="awq")]


def test_sink_columns_are_scaled_where_something_before_takes_it_and_cost_nothing() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    found = {Q: 0.5, DOWN: 0.4, OUT: 0.3}
    plain = planned(decoder, energies=found)
    plan = planned(decoder, "protect.channels=scale", energies=found)
    assert plan.weight_bytes == plain.weight_bytes
    assert plan.transforms == [Transform(name="scale")]
    kept = {name for name, decision in plan.modules.items() if decision.keep == "scale"}
    assert kept == {Q, K, K.replace("k_proj", "v_proj"), DOWN, OUT}
    assert all(plan.modules[name].columns == [3] for name in kept)
    assert "model.layers.1.mlp.up_proj down" in plan.modules[DOWN].reason
    assert "it reads what model.layers.1.self_attn.q_proj reads" in plan.modules[K].reason
    aware = make_control(decoder.shape("tiny"), sink_map_of(decoder, found),
                         RECIPE.replace(["protect.channels=scale"]), plan)
    assert aware.transforms == []


def test_sink_columns_are_left_unprotected_with_the_reason_where_nothing_takes_a_scale() -> None:
    neox = Decoder.of(tiny_model("gpt_neox"))
    down = "gpt_neox.layers.1.mlp.dense_4h_to_h"
    plan = planned(neox, "protect.channels=scale", energies={down: 0.5})
    assert plan.transforms == []
    assert "left unprotected, since no norm or linear that is known stands before it" in plan.modules[down].reason
    decoder = Decoder.of(tiny_model("llama"))
    plan = planned(decoder, "protect.channels=scale", "weights.rotate=full", energies={Q: 0.5, OUT: 0.4, DOWN: 0.3})
    assert {name for name, decision in plan.modules.items() if decision.keep} == {DOWN}
    assert "weights.rotate=full spreads" in plan.modules[Q].reason
    plan = planned(decoder, "protect.channels=scale", "weights.rotate=values", energies={OUT: 0.4})
    assert "weights.rotate=values spreads" in plan.modules[OUT].reason


def test_values_that_a_prefix_has_to_fit_are_not_scaled() -> None:
    decoder = Decoder.of(tiny_model("llama", head_dim=32))
    cached = ("kv_cache.prefix=bos", "kv_cache.group_size=32")
    plan = planned(decoder, "weights.smooth=awq", "protect.channels=scale", *cached, energies={OUT: 0.5, DOWN: 0.4})
    assert [transform.values for transform in plan.transforms] == [False, False]
    assert "the prefix of the KV cache" in plan.modules[OUT].reason
    plan.transforms[0] = Transform(name="awq")
    with pytest.raises(RequestError, match="scales values, which the prefix"):
        accept_edited(plan, decoder.shape("tiny"))


def test_a_budget_does_not_give_up_what_costs_nothing() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    plan = planned(decoder, "protect.channels=scale", "budget.bits=5", "weights.bits=4", energies={DOWN: 0.5})
    assert plan.modules[DOWN].keep == "scale"
