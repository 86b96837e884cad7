"""The sweep: every solved point is on the frontier, none is beaten by a uniform plan, and the page shows them all."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_frontier
from sinkquant.recipe import Recipe
from sinkquant.report.frontier import page, rows

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
RECIPE = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.solver=sensitivity",
                           "budget.bits=4.5"])
COSTS = sensitivity_of(SHAPE, {"model.layers.1.mlp.down_proj": 1000.0, "model.layers.0.self_attn.q_proj": 0.001})


def test_no_uniform_plan_is_below_the_solved_ones() -> None:
    found = make_frontier(SHAPE, sink_map_of(DECODER), RECIPE, COSTS)
    solved = [point for point in found.points if point.kind == "solved"]
    assert len(solved) > 12
    assert [point.bytes for point in solved] == sorted(point.bytes for point in solved)
    assert [point.kl for point in solved] == sorted((point.kl for point in solved), reverse=True)
    asked = next(point for point in found.points if point.kind == "asked")
    others = [point for point in found.points if point.kind in ("uniform", "control")]
    assert len(others) == 8
    for point in others:
        assert all(one.kl <= point.kl for one in solved if one.bytes >= point.bytes), point.name
    assert next(point for point in others if point.kind == "control").kl > 2 * asked.kl
    assert asked.bits_per_weight <= 4.5
    assert asked.kl_sinks == pytest.approx(0.1 * asked.kl)
    shown = page(found)
    assert all(cell in shown for row in rows(found) for cell in row[1:])
    assert "http" not in shown.replace("http://www.w3.org", "")


def test_the_cache_counts_where_the_budget_has_a_context() -> None:
    recipe = RECIPE.replace(["budget.bits=null", "budget.bytes=400000", "budget.context=64", "budget.batch=2"])
    found = make_frontier(SHAPE, sink_map_of(DECODER), recipe, COSTS, points=3)
    alone = make_frontier(SHAPE, sink_map_of(DECODER), RECIPE, COSTS, points=3)
    assert found.kv_bytes == 2 * 2 * 64 * 3 * 2 * 32
    assert found.points[0].bytes == alone.points[0].bytes + found.kv_bytes
    with pytest.raises(RequestError, match=r"weights\.rotate=values changes the weights"):
        make_frontier(SHAPE, sink_map_of(DECODER), RECIPE.replace(["weights.rotate=values"]), COSTS)


def test_what_was_not_tried_is_not_drawn_as_lossless() -> None:
    recipe = RECIPE.replace(["weights.group_size=64", "sensitivity.group_sizes=[32]"])
    found = make_frontier(SHAPE, sink_map_of(DECODER), recipe, COSTS, points=3)
    assert {point.kind for point in found.points} == {"solved", "asked"}
    assert any("not drawn" in note and "all 2 bits" in note and "its control" in note for note in found.notes)
    fixed = ["weights.overrides=[{pattern: '*.0.mlp.down_proj', bits: 4, group_size: 64}]", "sensitivity.bits=[2,3]"]
    costs = sensitivity_of(SHAPE, bits=(2, 3))
    left_out = make_frontier(SHAPE, sink_map_of(DECODER), RECIPE.replace([*fixed, "budget.bits=3"]), costs, points=3)
    assert {point.kind for point in left_out.points} >= {"solved", "asked", "uniform"}
    assert any("no loss counts 1 parts" in note and "layers.0.mlp.down_proj" in note for note in left_out.notes)
