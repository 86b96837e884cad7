"""The `prune` section of a recipe becomes part of a plan, or is refused."""

from __future__ import annotations

import pytest
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan
from sinkquant.artifacts.pruning import Pruning, pattern_group
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_plan
from sinkquant.recipe import Recipe

QUERY = "model.layers.0.self_attn.q_proj"


def planned(*assignments: str, family: str = "llama", **config: int) -> Plan:
    decoder = Decoder.of(tiny_model(family, **config))
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), Recipe().replace(
        ["weights.group_size=32", *assignments]))


def test_a_recipe_that_prunes_nothing_gives_the_plan_that_it_gave_before() -> None:
    plan = planned()
    assert all(decision.prune is None for decision in plan.modules.values())
    assert "sparsity" not in plan.predicted


def test_the_plan_says_what_every_module_loses() -> None:
    plan = planned("prune.method=wanda", "prune.pattern=2:4", "prune.ignore=['*.q_proj', '*.k_proj', '*.v_proj']")
    assert plan.modules[QUERY].prune is None
    other = plan.modules["model.layers.1.mlp.up_proj"]
    assert other.prune == Pruning(method="wanda", sparsity=0.5, pattern="2:4")
    assert other.reason.endswith("50% of its weights pruned by wanda, 2:4")
    assert other.bytes == planned().modules["model.layers.1.mlp.up_proj"].bytes
    assert 0.3 < plan.predicted["sparsity"] < 0.5
    assert Plan.parse(plan.model_dump(mode="json", by_alias=True), "here").modules == plan.modules


@pytest.mark.parametrize(("assignments", "sparsity"), [
    (["prune.sparsity=0.3"], 0.3), ([], 0.5), (["prune.pattern=1:4"], 0.75),
    (["prune.pattern=3:8", "prune.sparsity=0.625"], 0.625)])
def test_sparsity_follows_the_pattern(assignments: list[str], sparsity: float) -> None:
    decision = planned("prune.method=magnitude", *assignments).modules[QUERY]
    assert decision.prune is not None
    assert decision.prune.sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize(("assignments", "message"), [
    (["prune.pattern=2:4", "prune.sparsity=0.6"], "sets 0.5 of the weights to zero, and prune.sparsity says 0.6"),
    (["prune.pattern=3:5"], "3:5 does not divide the 64 input columns"),
    (["prune.ignore=['*.nothing']"], "matches no module"), (["prune.ignore=['*']"], "no module to prune"),
    (["prune.pattern=4:4"], "'n:m' with 0 < n < m"), (["prune.pattern=half"], "'n:m' with 0 < n < m"),
    (["prune.sparsity=1"], "prune.sparsity"), (["prune.methode=wanda"], "did you mean 'method'")])
def test_what_cannot_be_done_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned("prune.method=wanda", *assignments)


def test_routers_and_what_else_is_fixed_are_not_pruned() -> None:
    plan = planned("prune.method=magnitude", family="qwen3_moe")
    assert plan.modules[QUERY].prune is not None
    for name, decision in plan.modules.items():
        assert decision.prune is None or not name.endswith((".gate", ".router")), name


def test_a_model_may_be_pruned_and_nothing_else() -> None:
    plan = planned("weights.ignore=['*']", "prune.method=magnitude")
    assert {decision.bits for decision in plan.modules.values()} == {16}
    assert not plan.needs_rows
    assert planned("weights.ignore=['*']", "prune.method=wanda").needs_rows
    with pytest.raises(RequestError, match="nothing that can be quantized"):
        planned("weights.ignore=['*']")


def test_an_edited_plan_keeps_its_pruning_or_is_refused() -> None:
    plan = planned("prune.method=wanda", "prune.pattern=2:4")
    shape = Decoder.of(tiny_model("llama")).shape("tiny")
    plan.modules[QUERY].prune = Pruning(method="sparsegpt", sparsity=0.25, pattern="6:8")
    accepted = accept_edited(plan, shape)
    assert accepted.modules == plan.modules
    assert accepted.predicted["sparsity"] < plan.predicted["sparsity"]
    for sparsity, pattern, message in ((0.5, "6:8", "make the two agree"), (0.5, "2-4", "'n:m' with"),
                                       (0.4, "3:5", "does not divide")):
        plan.modules[QUERY].prune = Pruning(method="wanda", sparsity=sparsity, pattern=pattern)
        with pytest.raises(RequestError, match=message):
            accept_edited(plan, shape)


def test_patterns() -> None:
    assert pattern_group("unstructured") is None
    assert pattern_group("2:4") == (2, 4)
    for wrong in ("0:4", "4:2", "2:", ":", "-1:4", "2:4:8", ""):
        with pytest.raises(ValueError, match="n:m"):
            pattern_group(wrong)
