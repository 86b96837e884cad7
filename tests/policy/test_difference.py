"""Two plans beside each other: what differs, what it weighs and loses; plans of different models."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan
from sinkquant.cli.tables.plans import changes, settings, totals
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.policy.difference import compare_plans
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
DOWN = "model.layers.1.mlp.down_proj"
SINKS = sink_map_of(DECODER, {DOWN: 0.6})
COSTS = sensitivity_of(SHAPE)


def planned(*assignments: str, costs: bool = False) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", *assignments])
    return make_plan(SHAPE, SINKS, recipe, COSTS if costs else None)


def cells(table) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_what_differs_is_listed_with_bytes_and_losses() -> None:
    a = planned(costs=True)
    b = planned("protect.channels=split", "weights.overrides=[{pattern: '*.0.*q_proj', bits: 8}]", "seed=3",
                "kv_cache={key_bits: 4}", costs=True)
    found = compare_plans(a, b, ("one", "two"))
    first = {change.module: change for change in found.modules}
    q = first["model.layers.0.self_attn.q_proj"]
    assert q.changed == {"bits": (4, 8)}
    assert q.bytes == tuple(plan.modules[q.module].bytes for plan in (a, b))
    assert [loss.total for loss in q.losses] == pytest.approx([4.0 ** -4 * 0.32, 4.0 ** -8 * 0.32])
    assert set(first) == {DOWN, *q.losses[0].modules}
    assert set(first[DOWN].changed) == {"keep", "columns"}
    assert first[DOWN].losses[1] is None  # columns beside the codes were no candidate
    assert found.same == len(a.modules) - 4
    assert found.b.weight_bytes - found.a.weight_bytes == b.weight_bytes - a.weight_bytes
    assert (found.a.kl, found.b.kl) == (a.predicted["kl"], None)
    assert found.settings["seed"] == (0, 3)
    assert set(found.settings) == {"seed", "kv_cache", "loads_in"}
    modules, changed, *_, before, after = cells(changes(found))
    assert changed[modules.index(q.module)] == "bits 4 -> 8"
    assert before.count("together") == after.count("together") == 2
    assert after[modules.index(DOWN)] == "not predicted"
    assert "not predicted" in cells(totals(found))[2]
    assert cells(settings(found))[0] == list(found.settings)


def test_settings_are_told_apart_to_the_leaf_and_sensitivities_may_come_later() -> None:
    a = planned("kv_cache={}", "weights.bits=3")
    b = planned("kv_cache={overrides: [{layers: [1], key_bits: 8}]}", "weights.bits=3", "calibration.rows=3")
    found = compare_plans(a, b, sensitivity=COSTS)
    assert found.modules == []
    assert found.settings["calibration.rows"] == (64, 3)
    assert found.settings["kv_cache.layers.1.key_bits"] == ([2, 2], [8, 8])
    assert found.a.kl == found.b.kl == pytest.approx(len(COSTS.units) * 4.0 ** -3 * 0.32)
    assert compare_plans(a, a).settings == {}


def test_plans_and_sensitivities_of_other_models_are_refused() -> None:
    other = Decoder.of(tiny_model("gpt_neox"))
    foreign = make_plan(other.shape("x"), sink_map_of(other), Recipe().replace(["weights.group_size=32"]))
    with pytest.raises(RequestError, match="of different models: only b has gpt_neox"):
        compare_plans(planned(), foreign)
    with pytest.raises(RequestError, match="sensitivities are of another model"):
        compare_plans(foreign, foreign, sensitivity=COSTS)


def test_what_a_checkpoint_holds_beside_its_linears_is_a_difference() -> None:
    untied = Decoder.of(tiny_model("llama", tie_word_embeddings=False)).shape("tiny")
    for key, values, where in (("weights.lm_head", (4, 6), "ends.lm_head.bits"),
                               ("kv_cache_scheme.strategy", ("tensor", "attn_head"), "kv_scheme.strategy")):
        plans = [make_plan(untied, SINKS, Recipe().replace(["weights.group_size=32", f"{key}={value}"]))
                 for value in values]
        assert compare_plans(*plans).settings[where] == values


def test_losses_that_other_sensitivities_do_not_know_are_gone() -> None:
    plan = planned("weights.method=rtn", costs=True)
    assert "kl" in plan.predicted
    assert compare_plans(plan, plan, sensitivity=sensitivity_of(SHAPE, bits=(2, 3))).a.kl is None
