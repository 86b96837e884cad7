"""A fractional number of bits for the KV cache: met to the byte, spent where heads lose most, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import sink_map_of
from small_runs import SMALL, model_folder

import sinkquant as sq
from sinkquant.artifacts import KVLoss, Plan
from sinkquant.artifacts.kv import cache_bytes, dense_bytes
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import check_solvable, make_plan, require_plannable
from sinkquant.policy.headers import plan_ready
from sinkquant.recipe import Recipe

DECODER = Decoder.of(tiny_model("llama"))
SHAPE, SINKS = DECODER.shape("tiny"), sink_map_of(DECODER)
COSTS = sensitivity_of(SHAPE).model_copy(update={"units": [], "kv": [
    KVLoss(layer=layer, head=head, kind=kind, bits=bits, no_op=(layer, head) == (2, 1),  # type: ignore[arg-type]
           predicted=(100.0 if (layer, head, kind) == (1, 0, "key") else 1e-6 if (layer, head) == (2, 1) else 0.01)
           * 4.0 ** -bits)
    for layer in range(3) for head in range(2) for kind in ("key", "value") for bits in (1, 2, 3, 4, 8)]})
ALONE = ["weights.ignore=['*']", "kv_cache.length=4096", "kv_cache.exact=first-n"]


def _made(*assignments: str) -> Plan:
    return make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, *assignments]), COSTS)


@pytest.mark.parametrize("bits", [3.4, 4.2, 6.0])
def test_the_budget_is_met_and_spent(bits: float) -> None:
    plan = _made(f"kv_cache.bits={bits}").kv_cache
    assert plan is not None
    assert 0.9 * bits < plan.bits_per_value <= bits
    lengths = range(4096 - plan.group_size + 1, 4097)
    counted = sum(cache_bytes(plan, length, plan.expected_exact) for length in lengths) / len(lengths)
    assert 16 * counted / dense_bytes(plan, 4096) <= bits


def test_bits_go_where_heads_lose_most() -> None:
    plan = _made("kv_cache.bits=4.2").kv_cache
    assert plan is not None
    keys = [(layer, head) for layer in range(3) for head in range(2) if plan.layers[layer].key_bits[head] == 8]
    assert (1, 0) in keys  # the one that loses ten thousand times as much
    assert plan.layers[2].key_bits[1] == plan.layers[2].value_bits[1] == 2  # read by no-ops alone


def test_heads_that_repeat_what_stood_far_back_get_more_bits() -> None:
    """Prose alone does not tell them: both have the same loss there."""
    asked = ["kv_cache.bits=2.6", "sensitivity.kv_bits=[1,2,3,4,8]"]
    costs = COSTS.model_copy(update={"kv": [loss.model_copy(update={
        "predicted": 0.01 * 4.0 ** -loss.bits,
        "repeated": (5.0 if (loss.layer, loss.head, loss.kind) == (0, 1, "key") else 0.01) * 4.0 ** -loss.bits})
        for loss in COSTS.kv]})
    plan = make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, *asked]), costs).kv_cache
    assert plan is not None
    keys = {(layer, head): bits for layer in range(3) for head, bits in enumerate(plan.layers[layer].key_bits)}
    assert keys.pop((0, 1)) > max(keys.values())
    assert plan.bits_per_value <= 2.6


def test_a_reason_says_whether_its_loss_was_measured() -> None:
    costs = COSTS.model_copy(update={"kv": [loss.model_copy(update={"measured": 0.5}) for loss in COSTS.kv]})
    for some, word in ((COSTS, "predicted"), (costs, "measured")):
        plan = make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, "kv_cache.bits=4.2"]), some).kv_cache
        assert plan is not None
        assert f"{word} +" in plan.layers[0].reason


def test_longer_windows_wait_for_room() -> None:
    windows = [_made(f"kv_cache.bits={bits}", f"kv_cache.length={length}").kv_cache.window  # type: ignore[union-attr]
               for bits, length in ((3.4, 4096), (3.4, 16384))]
    assert windows[0] < windows[1] == 128
    assert _made("kv_cache.bits=6", "kv_cache.group_size=32").kv_cache.group_size == 32  # type: ignore[union-attr]


def test_what_cannot_be_met_is_refused_with_what_can() -> None:
    with pytest.raises(RequestError, match=r"kv_cache.bits 2.1 cannot be met at .*4096.* takes 2\.\d+ bits.*length\.$"):
        _made("kv_cache.bits=2.1")
    assert _made("kv_cache.bits=2.1", "sensitivity.kv_bits=[1,2,3,4,8]").kv_cache.bits_per_value <= 2.1  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"takes 3\.\d+ bits; .*, or set kv_cache.scale_bits to 8\.$"):
        _made("kv_cache.bits=2.1", "kv_cache.scale_bits=16")
    with pytest.raises(RequestError, match="find_sensitivity"):
        make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, "kv_cache.bits=4"]), None)


def test_what_a_refusal_names_can_be_had() -> None:
    for length in range(2200, 4000, 300):
        with pytest.raises(RequestError, match="cannot be met") as refused:
            _made("kv_cache.bits=1.1", f"kv_cache.length={length}")
        nearest = str(refused.value).partition(" takes ")[2].partition(" bits")[0]
        assert _made(f"kv_cache.bits={nearest}", f"kv_cache.length={length}").kv_cache is not None


def test_the_loss_of_a_cache_with_a_budget_of_its_own_is_predicted() -> None:
    plan = _made("kv_cache.bits=4.2")
    assert plan.kv_cache is not None
    assert plan.predicted["kl_kv"] == pytest.approx(sum(loss.loss for loss in COSTS.kv if getattr(
        plan.kv_cache.layers[loss.layer], f"{loss.kind}_bits")[loss.head] == loss.bits))
    assert "kl" not in plan.predicted


def test_beside_a_budget_of_weights_both_may_name_bits() -> None:
    beside = ["weights.ignore=[]", "weights.group_size=32", "weights.method=rtn", "budget.bits=5",
              "budget.solver=sensitivity", "sensitivity.kv_bits=[1,2,3,4,8]"]
    recipe = Recipe().replace([*ALONE, *beside, "kv_cache.bits=2.6"])
    check_solvable(recipe)
    plan = make_plan(SHAPE, SINKS, recipe, sensitivity_of(SHAPE).model_copy(update={"kv": COSTS.kv}))
    assert plan.kv_cache is not None
    assert plan.kv_cache.bits_per_value <= 2.6
    assert plan.bits_per_weight <= 5
    with pytest.raises(RequestError, match="both choose"):
        check_solvable(recipe.replace(["budget.bytes=500000", "budget.context=4096"]))


def test_a_run_refuses_before_anything_is_computed_and_else_meets_it(tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "in", num_hidden_layers=2)
    recipe = Recipe().replace([f"calibration.text={text_file}", f"evaluate.text={text_file}", *SMALL, *ALONE,
                               "evaluate.skip=true", "sensitivity.kv_length=192", "sensitivity.kv_rows=2"])
    with pytest.raises(RequestError, match="cannot be met"):
        sq.run(recipe.replace(["kv_cache.bits=2.2"]), folder, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    sq.run(recipe.replace(["kv_cache.bits=4.5", "kv_cache.window=32"]), folder, tmp_path / "out")
    whole = Plan.load(tmp_path / "out" / "plan.json")
    plan = whole.kv_cache
    assert plan is not None
    assert 3.5 < plan.bits_per_value <= 4.5
    assert len({bits for layer in plan.layers for bits in layer.key_bits + layer.value_bits}) > 1
    sq.run(None, folder, tmp_path / "edited", edited=whole, plan_only=True,
           sensitivity=tmp_path / "out" / "sensitivity.json")
    assert Plan.load(tmp_path / "edited" / "plan.json").predicted == whole.predicted


@pytest.mark.parametrize("what", ["kv_cache.prefix=bos", "kv_cache.exact=massive"])
def test_what_detection_finds_is_left_to_it(what: str) -> None:
    recipe = Recipe().replace([*ALONE, "kv_cache.bits=4", what])
    require_plannable(SHAPE, recipe)
    assert plan_ready(SHAPE, recipe, None, None) == (None, ["kv_cache.bits"])


def test_the_fewest_bits_that_are_tried_are_what_a_budget_starts_from() -> None:
    long = ["kv_cache.length=16384", "sensitivity.kv_bits=[4,8]"]
    costs = COSTS.model_copy(update={"kv": [loss for loss in COSTS.kv if loss.bits in (4, 8)]})
    with pytest.raises(RequestError, match=r"with 4-bit codes, .* takes 4\.\d+ bits"):
        make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, *long, "kv_cache.bits=4.5"]), costs)
    plan = make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, *long, "kv_cache.bits=5.5"]), costs)
    assert plan.kv_cache is not None
    assert {bits for layer in plan.kv_cache.layers for bits in layer.key_bits + layer.value_bits} == {4, 8}
    assert "4 to 8 (most in " in plan.kv_cache.in_words()
    with pytest.raises(RequestError, match=r"make them anew with fewer in sensitivity\.kv_bits"):
        make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, "kv_cache.length=16384", "kv_cache.bits=4.5"]), costs)
    foreign = costs.model_copy(update={"kv": [costs.kv[0].model_copy(update={"head": 7})]})
    with pytest.raises(RequestError, match="no KV head 7 in layer 0"):
        make_plan(SHAPE, SINKS, Recipe().replace([*ALONE, *long, "kv_cache.bits=5"]), foreign)
