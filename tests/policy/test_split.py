"""protect.channels: split — which columns and single weights leave the groups, and what that weighs."""

from __future__ import annotations

from typing import Any

import pytest
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan, SuperWeight
from sinkquant.artifacts.sizes import module_bytes
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.recipe import Recipe

DOWN = "model.layers.1.mlp.down_proj"
Q, K, V, OUT = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo")
SUPERS = tuple(SuperWeight(module=DOWN, row=row, column=column, value=3.0, loss_increase=0.4)
               for row, column in ((2, 9), (1, 3), (1, 7)))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.of(tiny_model("llama"))


def planned(decoder: Decoder, *assignments: str, supers: tuple[SuperWeight, ...] = (), **energies: float) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", "protect.channels=split", *assignments])
    sink_map = sink_map_of(decoder, {DOWN: 0.6, Q: 0.2} | energies, super_weights=supers)
    return make_plan(decoder.shape("tiny"), sink_map, recipe)


def test_the_columns_that_sinks_set_stand_beside_the_codes_with_the_reason(decoder: Decoder) -> None:
    plan = planned(decoder, supers=SUPERS)
    down = plan.modules[DOWN]
    assert (down.bits, down.keep, down.columns) == (4, "split", [3])
    assert down.scalars == [(1, 7), (2, 9)]  # the one in column 3 is exact with it
    assert down.reason.startswith("4 bits, 1 input column (3) and 2 single weights in 16 bits beside the codes: ")
    assert "sets its input range" in down.reason
    for name in (Q, K, V):
        assert (plan.modules[name].keep, plan.modules[name].columns) == ("split", [3])
    assert plan.modules[OUT].keep is None
    assert plan.loads_in == ["sinkquant"]
    plain = planned(decoder, "protect.channels=none")
    assert plain.loads_in == ["transformers", "vllm"]
    # 16 bits a row of the column and 32 for its index; 16 bits a single weight and 64 for its place.
    assert down.bytes - plain.modules[DOWN].bytes == 64 * 2 + 4 + 2 * (2 + 8)
    assert plan.modules[K].bytes - plain.modules[K].bytes == 32 * 2 + 4


def test_fused_modules_take_the_column_of_a_super_weight(decoder: Decoder) -> None:
    above = SuperWeight(module=K, row=4, column=11, value=3.0, loss_increase=0.4)
    plan = planned(decoder, supers=(above,))
    assert [plan.modules[name].columns for name in (Q, K, V)] == [[11]] * 3  # the most affected module speaks first
    assert not plan.modules[K].scalars


def test_no_more_is_kept_than_the_share_allows(decoder: Decoder) -> None:
    weights = sum(linear.parameters for linear in decoder.shape("").linears.values())
    share = (64 + 64 + 32 + 32 - 1) / weights  # a column of down_proj fits, those of q, k and v do not fit too
    plan = planned(decoder, f"protect.max_share={share}")
    assert [name for name, decision in plan.modules.items() if decision.keep] == [DOWN]
    assert planned(decoder, "protect.max_share=0").loads_in == ["transformers", "vllm"]


@pytest.mark.parametrize("bits", [4.6, 5.0, 8.9, 12.0])
def test_a_budget_counts_what_stands_beside(decoder: Decoder, bits: float) -> None:
    plan = planned(decoder, f"budget.bits={bits}", supers=SUPERS)
    assert bits * 0.9 < plan.bits_per_weight <= bits
    shape = decoder.shape("tiny")
    for name, decision in plan.modules.items():
        assert decision.bytes == module_bytes(shape, name, decision.form)
        assert decision.bits < 16 or not (decision.keep or decision.columns or decision.scalars)


def test_overrides_of_fused_modules_keep_the_shared_columns(decoder: Decoder) -> None:
    for override in ("bits: 6", "bits: 16"):
        plan = planned(decoder, f"weights.overrides=[{{pattern: '{K}', {override}}}]")
        assert len({(plan.modules[name].form, tuple(plan.modules[name].columns)) for name in (Q, K, V)}) == 1


def test_the_control_splits_nothing_and_is_a_plain_checkpoint() -> None:
    decoder = Decoder.of(tiny_model("llama", hidden_size=256, intermediate_size=768))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, {DOWN: 0.6, Q: 0.2}, super_weights=SUPERS)
    recipe = Recipe().replace(["weights.group_size=32", "protect.channels=split"])
    aware = make_plan(shape, sink_map, recipe)
    control = make_control(shape, sink_map, recipe, aware)
    assert abs(control.weight_bytes - aware.weight_bytes) < 0.01 * aware.weight_bytes
    assert not any(decision.keep or decision.scalars for decision in control.modules.values())
    assert "sinkquant" not in control.loads_in


@pytest.mark.parametrize(("name", "update", "message"), [
    (DOWN, {"columns": [3, 128]}, "keeps column 128 .* which has 128 input columns"),
    (DOWN, {"columns": [5, 3]}, "must be ascending"), (DOWN, {"scalars": [(1, 3)]}, "in none of them"),
    (DOWN, {"scalars": [(64, 7)]}, "64 rows"), (DOWN, {"bits": 16, "group_size": None, "method": "none"}, "splits"),
    (K, {"columns": [4]}, "engines fuse them")])
def test_an_edited_plan_that_splits_what_is_not_there_is_refused(decoder: Decoder, name: str, update: dict[str, Any],
                                                                 message: str) -> None:
    plan = planned(decoder)
    edited = plan.modules | {name: plan.modules[name].model_copy(update=update)}
    with pytest.raises(RequestError, match=message):
        accept_edited(plan.model_copy(update={"modules": edited}), decoder.shape("tiny"))


def test_an_edited_plan_is_counted_anew(decoder: Decoder) -> None:
    plan = planned(decoder, supers=SUPERS)
    assert accept_edited(plan, decoder.shape("tiny")).modules == plan.modules
    more = plan.modules | {DOWN: plan.modules[DOWN].model_copy(update={"columns": [3, 5]})}
    counted = accept_edited(plan.model_copy(update={"modules": more}), decoder.shape("tiny"))
    assert counted.modules[DOWN].bytes == plan.modules[DOWN].bytes + 64 * 2 + 4
    assert counted.loads_in == ["sinkquant"]


@pytest.mark.parametrize("other", ["prune.method=magnitude", "prune.heads=no-op", "weights.rotate=values"])
def test_pruning_or_rotating_what_is_split_is_refused(decoder: Decoder, other: str) -> None:
    with pytest.raises(RequestError, match="choose one of the two"):
        planned(decoder, other)
