"""Which policy of token weights a plan carries, and where one is refused."""

from __future__ import annotations

import pytest
from families import tiny_model
from sinkmaps import BOS, STOP, sink_map_of
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_control, make_plan
from sinkquant.recipe import Recipe


def planned(tiny: PreTrainedModel, *assignments: str) -> tuple[Plan, Plan]:
    """The plan of a model whose sinks are `<s>` and ".", and its control's."""
    decoder = Decoder.of(tiny)
    recipe = Recipe().replace(["weights.group_size=32", *assignments])
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, tokens=(BOS, STOP))
    aware = make_plan(shape, sink_map, recipe)
    return aware, make_control(shape, sink_map, recipe, aware)


@pytest.mark.parametrize("policy", ["all", "boost", "attention", "cap"])
def test_the_plan_follows_the_recipe_and_the_control_knows_no_sink(policy: str, tiny: PreTrainedModel) -> None:
    aware, control = planned(tiny, f"protect.statistics={policy}")
    assert aware.calibration.statistics == policy
    assert len(aware.calibration.sinks) == 2
    assert (control.calibration.statistics, control.calibration.sinks) == ("all", [])


@pytest.mark.parametrize(("asked", "policy"), [
    ([], "boost"), (["prune.method=wanda"], "boost"), (["prune.method=sparsegpt", "weights.ignore=['*']"], "boost"),
    (["prune.method=wanda", "weights.ignore=['*']"], "attention"),
    (["prune.method=wanda", "weights.method=rtn"], "attention"),
    (["prune.method=wanda", "weights.method=rtn", "weights.overrides=[{pattern: '*.o_proj', bits: 4, method: gptq}]"],
     "boost"), (["prune.method=wanda", "weights.ignore=['*']", "protect.statistics=cap"], "cap"),
    (["prune.method=wanda", "protect.tokens=false"], "all")])
def test_what_a_recipe_leaves_open_is_what_measured_best(asked: list[str], policy: str, tiny: PreTrainedModel) -> None:
    aware, control = planned(tiny, *asked)
    assert (aware.calibration.statistics, control.calibration.statistics) == (policy, "all")


def test_without_protected_tokens_all_weigh_the_same(tiny: PreTrainedModel) -> None:
    aware, _ = planned(tiny, "protect.tokens=false", "protect.statistics=attention")
    assert (aware.calibration.statistics, aware.calibration.sinks) == ("all", [])


def test_sinks_are_left_out_only_where_a_prefix_keeps_them(tiny: PreTrainedModel) -> None:
    with pytest.raises(RequestError, match=r"kv_cache\.prefix=bos"):
        planned(tiny, "protect.statistics=exclude")
    aware, _ = planned(tiny, "protect.statistics=exclude", "kv_cache={prefix: bos}")
    # "." is no part of the prefix, so that it still counts.
    assert [(sink.token_id, sink.position) for sink in aware.calibration.sinks] == [(1, 0)]


def test_a_cache_scheme_that_excludes_sinks_knows_them_without_their_protection() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "protect.tokens=false", "kv_cache_scheme={sinks: exclude}"])
    decoder = Decoder.of(tiny_model("llama"))
    settings = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe).calibration
    assert settings.sinks
    assert settings.statistics == "all"
