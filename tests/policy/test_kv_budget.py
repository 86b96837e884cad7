"""Budgets that choose the bits of the KV cache as well."""

from __future__ import annotations

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import KVLoss, Plan, Sensitivity
from sinkquant.artifacts.kv import cache_bytes
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_control, make_frontier, make_plan
from sinkquant.policy.kv_budget import kv_bytes_of
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE = DECODER.shape("tiny")
SINKS = sink_map_of(DECODER)
BITS = (2, 3, 4, 8)


def costs(heavy: tuple[int, int, str] = (1, 0, "key")) -> Sensitivity:
    """All heads alike but one, and one that only no-ops read."""
    kv = [KVLoss(layer=layer, head=head, kind=kind, bits=bits, no_op=(layer, head) == (2, 1),  # type: ignore[arg-type]
                 predicted=(100.0 if (layer, head, kind) == heavy else 1e-6 if (layer, head) == (2, 1) else 0.01)
                 * 4.0 ** -bits)
          for layer in range(3) for head in range(2) for kind in ("key", "value") for bits in BITS]
    return sensitivity_of(SHAPE).model_copy(update={"kv": kv})


def solved(*assignments: str) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.context=512", "budget.batch=4",
                               "kv_cache={window: 32, group_size: 32}", f"sensitivity.kv_bits={list(BITS)}",
                               *assignments])
    return make_plan(SHAPE, SINKS, recipe, costs())


@pytest.mark.parametrize("allowed", [420_000, 600_000, 800_000])
def test_the_cache_gets_bits_where_they_count_and_the_bytes_are_kept(allowed: int) -> None:
    plan = solved(f"budget.bytes={allowed}")
    cache = plan.kv_cache
    assert cache is not None
    spent = plan.weight_bytes + cache_bytes(cache, 512, cache.expected_exact, 4)
    assert allowed - 9000 < spent <= allowed
    assert cache.layers[1].key_bits[0] == max(bits for one in cache.layers for bits in one.key_bits + one.value_bits)
    assert cache.layers[2].key_bits[1] == min(bits for one in cache.layers for bits in one.key_bits + one.value_bits)
    assert "read by no-ops alone: head 1" in cache.layers[2].reason
    known = {(one.layer, one.head, one.kind, one.bits): one.loss for one in costs().kv}
    assert plan.predicted["kl_kv"] == pytest.approx(sum(
        known.get((index, head, kind, bits), 0.0) for index, one in enumerate(cache.layers)
        for kind, every in (("key", one.key_bits), ("value", one.value_bits)) for head, bits in enumerate(every)))


def test_the_losses_of_a_cache_are_not_its_controls() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "kv_cache={window: 32, group_size: 32}"])
    plan = make_plan(SHAPE, SINKS, recipe, costs())
    control = make_control(SHAPE, SINKS, recipe, plan, costs())
    assert "kl_kv" in plan.predicted
    assert control.predicted["kl"] > 0
    assert "kl_kv" not in control.predicted
    assert any("what the KV cache loses is not in it" in note for note in control.notes)


def test_where_the_cache_alone_was_measured_a_plan_of_weights_says_so() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "kv_cache={window: 32, group_size: 32}"])
    alone = costs().model_copy(update={"units": []})
    plan = make_plan(SHAPE, SINKS, recipe, alone)
    assert "kl_kv" in plan.predicted
    assert plan.notes[-1] == "no loss is predicted: the sensitivities are of the KV cache or of inputs alone"
    assert not make_plan(SHAPE, SINKS, recipe.replace(["weights.ignore=['*']"]), alone).notes


def test_what_overrides_fix_stays() -> None:
    plan = solved("budget.bytes=500000", "kv_cache.overrides=[{layers: [1], heads: [0], key_bits: 2}]")
    assert plan.kv_cache is not None
    assert plan.kv_cache.layers[1].key_bits[0] == 2


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(RequestError, match=r"name budget\.bytes and budget\.context"):
        solved("budget.context=null", "budget.bits=4", "budget.solver=sensitivity")
    with pytest.raises(RequestError, match=r"hold no losses of the KV cache"):
        make_plan(SHAPE, SINKS, Recipe().replace([
            "weights.group_size=32", "weights.method=rtn", "budget.context=512", "budget.bytes=500000",
            "kv_cache={window: 32, group_size: 32}", "sensitivity.kv_bits=[4]"]), sensitivity_of(SHAPE))
    with pytest.raises(RequestError, match=r"raise budget\.bytes to ([\d,]+)") as refused:
        solved("budget.bytes=200000")
    nearest = int(str(refused.value).split("raise budget.bytes to ")[1].split(", or")[0].replace(",", ""))
    assert solved(f"budget.bytes={nearest}").predicted["kl_kv"] > 0


def test_a_sweep_moves_the_cache_too() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.context=512", "budget.batch=4",
                               "kv_cache={window: 32, group_size: 32}", f"sensitivity.kv_bits={list(BITS)}",
                               "budget.bytes=600000"])
    found = make_frontier(SHAPE, SINKS, recipe, costs(), points=8)
    points = [point for point in found.points if point.kind == "solved"]
    assert [point.kl for point in points] == sorted((point.kl for point in points), reverse=True)
    asked = next(point for point in found.points if point.kind == "asked")
    plan = make_plan(SHAPE, SINKS, recipe, costs())
    assert asked.kl == pytest.approx(plan.predicted["kl"] + plan.predicted["kl_kv"])
    assert asked.bytes <= 600_000
    assert all(point.kl <= asked.kl for point in points if point.bytes >= asked.bytes)


def test_a_cache_of_bits_of_its_own_is_counted_with_them() -> None:
    recipe = Recipe().replace(["weights.group_size=32", "weights.method=rtn", "budget.context=4096",
                               "budget.bytes=1000000", "kv_cache={bits: 8, length: 4096, window: 32}"])
    plan = make_plan(SHAPE, SINKS, recipe, costs())
    assert plan.kv_cache is not None
    cache = kv_bytes_of(SHAPE, recipe.budget, plan.kv_cache)
    assert cache > 700_000
    assert 900_000 < plan.weight_bytes + cache <= 1_000_000
    found = make_frontier(SHAPE, SINKS, recipe, costs(), points=3)
    assert all(point.bytes > cache for point in found.points)
    with pytest.raises(RequestError, match=rf"and {cache:,} of the KV cache"):
        make_plan(SHAPE, SINKS, recipe.replace(["budget.bytes=700000"]), costs())
