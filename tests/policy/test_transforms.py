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


def planned(decoder: Decoder, *changes: str) -> Plan:
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), RECIPE.replace(changes))


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
