"""Every decision's sentence: what was found, whether it is protected, and what the step below would cost."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Channel, Plan, SuperWeight
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.policy.rules import born_here
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
DOWN = "model.layers.1.mlp.down_proj"
OUT, K = "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.k_proj"
CHANNELS = tuple(Channel(channel=channel, peak=9.0, ratio=80.0, born=born, ended=None, tokens=["<s>"])
                 for channel, born in ((16, "layers.1.mlp"), (7, "layers.1.attention"), (5, "embedding")))
SUPER = tuple(SuperWeight(module=DOWN, row=row, column=2, value=1.0, loss_increase=0.4) for row in (1, 9))
SINKS = sink_map_of(DECODER, {DOWN: 0.6}, channels=CHANNELS, super_weights=SUPER)
BORN = "the massive activation in channel 16 is born here"


def planned(*assignments: str, costs: bool = True) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", *assignments])
    return make_plan(SHAPE, SINKS, recipe, sensitivity_of(SHAPE, groups=(32, 64)) if costs else None)


def test_only_what_writes_the_stream_gives_birth() -> None:
    born = {name: words for name in SHAPE.linears if (words := born_here(name, SHAPE, SINKS))}
    assert born == {OUT: "the massive activation in channel 7 is born here", DOWN: BORN}


def test_an_unprotected_linear_says_what_was_found_in_it_and_what_it_loses() -> None:
    plan = planned()
    total, below = 4.0 ** -4 * 0.32, 4.0 ** -4 * 0.64
    assert plan.modules[DOWN].reason == (
        f"4 bits: as weights.bits asks; no channel is kept for the sinks: {BORN}; '<s>' sets its input range (90 "
        "against 4 elsewhere) and gives 60% of trace(H); it holds the super weights [1, 2], [9, 2] (+0.4 nats without "
        f"the first); predicted {total:+.2g} nats, of which {total / 10:.2g} through '<s>'; at 4 bits and groups of 64 "
        f"{below:+.2g} nats, of which {below / 10:.2g} through '<s>'")
    assert "for q_proj + k_proj + v_proj together" in plan.modules[K].reason
    assert {loss.modules[0] for loss in plan.losses} == {unit.modules[0] for unit in sensitivity_of(SHAPE).units}
    assert sum(loss.total for loss in plan.losses) == pytest.approx(plan.predicted["kl"])


def test_without_sensitivities_the_reason_is_all() -> None:
    plan = planned(costs=False)
    assert BORN in plan.modules[DOWN].reason
    assert plan.modules[OUT].reason.endswith("the massive activation in channel 7 is born here")
    assert not any("nats, of" in decision.reason for decision in plan.modules.values())
    assert plan.losses == []
    assert plan.modules[K].reason == "4 bits: as weights.bits asks"


def test_a_protected_linear_says_so_once() -> None:
    kept = planned("protect.channels=module", "protect.max_share=1").modules[DOWN].reason
    assert kept.startswith(f"8 bits: {BORN}")
    assert kept.count(BORN) == 1
    assert "no channel is kept" not in kept


def test_weights_that_change_before_have_no_predicted_loss() -> None:
    plan = planned("weights.rotate=values")
    assert "kl" not in plan.predicted
    assert any(note.startswith("no loss is predicted: the sensitivities are of the weights before rotate")
               for note in plan.notes)
    assert "predicted" not in plan.modules[DOWN].reason
