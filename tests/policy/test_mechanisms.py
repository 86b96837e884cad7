"""Every kind of protection alone beside its control: same bytes, nothing where nothing would be kept, reasons."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import BOS, STOP, sink_map_of

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.advice import MeasuredWorth
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy.mechanisms import Mechanism, mechanisms
from sinkquant.policy.worth import formats_of, judged, predicted_worth
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
DOWN = "model.layers.1.mlp.down_proj"
SINKS = sink_map_of(DECODER, {DOWN: 0.6})
SMALL = ["weights.group_size=32", "protect.max_share=1", "kv_cache={}"]


def asked(*assignments: str, sink_map: SinkMap = SINKS) -> dict[tuple[str, str], Mechanism]:
    found = mechanisms(SHAPE, sink_map, Recipe().replace([*SMALL, *assignments]))
    return {(one.name, one.applies_to): one for one in found}


def test_each_alone_and_its_control_have_the_same_bytes() -> None:
    found = asked()
    assert all(one.aware is not None for one in found.values())
    for (name, where), one in found.items():
        aware, control = one.aware, one.control
        assert abs(aware.weight_bytes - control.weight_bytes) <= 0.01 * aware.weight_bytes, name
        assert control.calibration.statistics == "all"
        assert (where == "KV cache") == (not aware.formats)
        assert sum(d.keep is not None for d in control.modules.values()) == 0
        if where == "KV cache":
            assert control.kv_cache.exact == "none"
            assert control.kv_cache.prefix == []
            assert abs(aware.kv_cache.bytes / control.kv_cache.bytes - 1) < 0.01
    assert found["split columns", "weights"].aware.modules[DOWN].keep == "split"
    assert found["boosted statistics", "weights"].aware.calibration.sinks[0].weight > 1
    assert found["prefix", "weights"].aware.kv_cache.prefix == [1]
    assert found["exact tokens", "KV cache"].aware.kv_cache.sinks


def test_the_number_of_first_tokens_is_the_recipes() -> None:
    kept = asked("kv_cache={exact: first-n, first_n: 8}")["exact tokens", "KV cache"]
    assert kept.settings == ["kv_cache.exact=first-n", "kv_cache.first_n=8"]
    assert kept.aware is not None
    assert kept.aware.kv_cache.first_n == 8


def test_a_recipe_that_prunes_is_advised_about_its_cache_too() -> None:
    found = asked("prune.method=wanda", "prune.pattern=2:4", "kv_cache={}")
    assert found["exact tokens", "KV cache"].aware is not None


@pytest.mark.parametrize("budget", ["budget.bits=5.3", "budget.bytes=140000"])
def test_under_a_budget_that_is_spent_evenly_both_plans_keep_it(budget: str) -> None:
    found = asked("weights.bits=3", budget)
    for (name, where), one in found.items():
        assert one.aware is not None, name
        aware, control = one.aware, one.control
        assert abs(aware.weight_bytes - control.weight_bytes) <= 0.01 * aware.weight_bytes, name
        if where == "KV cache":
            assert not aware.formats
        elif "bits" in budget:
            assert 5.1 < aware.bits_per_weight <= 5.3
        else:
            assert 138_000 < aware.weight_bytes <= 140_000
    assert found["whole linears in more bits", "weights"].aware.modules[DOWN].bits == 8


def test_a_model_without_sinks_has_nothing_to_keep_and_says_why() -> None:
    found = asked(sink_map=sink_map_of(DECODER, tokens=()))
    assert {name for (name, _), one in found.items() if one.aware is not None} == {
        "statistics by attention", "prefix", "excluded statistics beside the prefix"}
    assert judged(found["exact tokens", "KV cache"], None, None)[1] == "Nothing here: no token of a prompt is a sink."
    learned = BOS.model_copy(update={"kind": "learned", "token_id": None, "position": None})
    assert asked(sink_map=sink_map_of(DECODER, tokens=(learned,)))["boosted statistics", "weights"].aware is None


def test_what_a_model_or_a_recipe_cannot_have_is_named() -> None:
    facts = SINKS.tokenization.model_copy(update={"rows_start_with_bos": False})
    found = asked(sink_map=SINKS.model_copy(update={"tokenization": facts}))
    answer, words = judged(found["prefix", "KV cache"], None, None)
    assert answer == "not possible"
    assert "do not start with <bos>" in words
    assert not asked("prune.method=wanda")["split columns", "weights"].possible
    plain = asked("weights.method=rtn")["capped statistics", "weights"]
    assert plain.possible
    assert "takes no statistics" in plain.why
    assert {where for _, where in asked("weights.ignore=['*']")} == {"KV cache"}
    assert {where for _, where in asked("kv_cache=null")} == {"weights"}
    static = asked("activations.format=int8", "activations.scale=tensor", "weights.bits=8", "weights.group_size=-1")
    assert static["static ranges without the sinks", "weights"].aware.modules[DOWN].activation_scale == "token"
    for wrong, words in ((["budget.loss=0.1"], "budget.solver=even, or leave the budget out"),
                         (["weights.group_size=48"], "does not divide"),
                         (["weights.ignore=['*']", "kv_cache={key_bits: 16, value_bits: 16}"], "nothing to protect")):
        with pytest.raises(RequestError, match=words):
            asked(*wrong)


def test_predictions_count_what_is_kept_as_lost_no_more_through_the_sinks() -> None:
    found = asked()
    plans = [plan for one in found.values() for plan in (one.aware, one.control) if plan.formats]
    _, measured, groups = formats_of(plans)
    assert (measured, groups) == ("sensitivity.measure_rows=0", "sensitivity.group_sizes=[32]")
    costs, dear = sensitivity_of(SHAPE), sensitivity_of(SHAPE, {DOWN: 4.0})
    one = 4.0 ** -4 * 0.32
    everything = one * len(costs.units)
    scaled = predicted_worth(found["scaled columns", "weights"], costs, costs)
    assert scaled.at_best
    assert scaled.aware == pytest.approx(everything - 0.1 * one)
    assert predicted_worth(found["split columns", "weights"], costs, costs) is None
    beside = costs.model_copy(update={"units": [
        unit.model_copy(update={"losses": [*unit.losses, unit.losses[0].model_copy(update={"bits": 4, "columns": 1})]})
        if unit.modules == [DOWN] else unit for unit in costs.units]})
    split = predicted_worth(found["split columns", "weights"], costs, beside)
    assert not split.at_best
    assert split.aware == pytest.approx(everything - one + 4.0 ** -2 * 0.32)
    prefix = predicted_worth(found["prefix", "weights"], costs, costs)
    assert (prefix.aware, prefix.control) == pytest.approx((0.9 * everything, everything))
    boost = predicted_worth(found["boosted statistics", "weights"], dear, costs)
    assert boost.gain == pytest.approx(3 * one)
    elsewhere = asked(sink_map=sink_map_of(DECODER, {DOWN: 0.6}, tokens=(BOS, STOP)))
    assert predicted_worth(elsewhere["prefix", "weights"], costs, costs) is None
    excluded = predicted_worth(found["excluded statistics beside the prefix", "weights"], costs, costs)
    assert excluded.gain == 0
    module = predicted_worth(found["whole linears in more bits", "weights"], costs, costs)
    assert not module.at_best
    assert module.aware == pytest.approx(everything - one + 4.0 ** -8 * 0.32)
    with pytest.raises(RequestError, match="before rotate"):
        formats_of([one.aware for one in asked("weights.rotate=values", "protect.max_share=0").values()
                    if one.aware is not None and one.aware.formats])


def test_the_answer_is_that_of_the_interval() -> None:
    one = asked()["exact tokens", "KV cache"]
    answers = [judged(one, None, MeasuredWorth(aware=0.1, control=0.1 + gain, gain=gain, low=gain - 0.05,
                                               high=gain + 0.05, rows=4))[0] for gain in (0.1, -0.09, 0.01)]
    assert answers == ["pays", "does not pay", "nothing here"]
    assert judged(one, None, None)[0] == "not measured"


def test_what_the_weights_have_does_not_stand_in_the_way() -> None:
    kept = asked(r"protect.modules=['re:layers\.1\..*down_proj$']")["whole linears in more bits", "weights"]
    assert kept.aware.modules[DOWN].keep == "module"
    assert asked("activations.format=int8", "kv_cache={}")["exact tokens", "KV cache"].aware is not None
    gemma = Decoder.of(tiny_model("gemma3_text"))
    recipe = Recipe().replace(["weights.group_size=32", "kv_cache={exact: detected, sliding_sinks: true}"])
    assert any(one.aware for one in mechanisms(gemma.shape("tiny"), sink_map_of(gemma), recipe))


def test_a_budget_of_the_cache_is_refused_with_its_key() -> None:
    with pytest.raises(RequestError, match=r"kv_cache\.bits gives heads other bits with every kind of protection"):
        mechanisms(SHAPE, SINKS, Recipe().replace(["kv_cache={bits: 2.4}"]))
