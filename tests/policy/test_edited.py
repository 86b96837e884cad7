"""What an edited plan still says: nothing of figures that were, and nothing that its parts contradict."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_plan
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE, SINKS = DECODER.shape("tiny"), sink_map_of(DECODER)


def planned(*assignments: str) -> Plan:
    return make_plan(SHAPE, SINKS, Recipe().replace(["weights.group_size=32", "weights.method=rtn", *assignments]),
                     sensitivity_of(SHAPE))


def test_notes_tell_of_no_figures_that_were() -> None:
    plan = planned("budget.bits=5", "budget.solver=sensitivity", "weights.lm_head=8", "kv_cache={}")
    assert [note.partition(" takes ")[0].partition(" of ")[0] for note in plan.notes] == [
        "lm_head", "solved for the budget", "the predicted loss is that", "the predicted loss is that"]
    head = plan.ends["lm_head"].model_copy(update={"bits": 4, "group_size": 32})
    (note,) = accept_edited(plan.model_copy(update={"ends": {"lm_head": head}}), SHAPE).notes
    assert "4 bits" in note
    mine = plan.model_copy(update={"notes": ["written by hand", *plan.notes]})
    assert accept_edited(mine, SHAPE).notes == ["written by hand", plan.notes[0]]


def test_sinks_that_are_left_out_need_the_prefix() -> None:
    plan = planned("weights.method=gptq", "kv_cache={prefix: bos}", "protect.statistics=exclude")
    assert accept_edited(plan, SHAPE).calibration.statistics == "exclude"
    with pytest.raises(RequestError, match=r"calibration\.statistics: 'exclude' needs a prefix"):
        accept_edited(plan.model_copy(update={"kv_cache": None}), SHAPE)
