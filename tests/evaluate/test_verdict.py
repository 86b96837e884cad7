"""The verdict in words, and the quality gate."""

from __future__ import annotations

import re

import pytest

from sinkquant.artifacts import Measure, Paired, Row
from sinkquant.artifacts.report import Fidelity, Verdict
from sinkquant.errors import RequestError
from sinkquant.evaluate.verdict import gate_failures, judge, require_gate
from sinkquant.recipe import Gate, Recipe


def row(name: str, kl: float | None, weight_bytes: int = 1000) -> Row:
    tasks = {} if kl is None else {"divergence": {"kl": Measure(value=kl)}}
    return Row(name=name, path=name, weight_bytes=weight_bytes, bits_per_weight=4.0, tasks=tasks)


def verdict(low: float | None, high: float = 0.0, gate: Gate | None = None, recovery: float | None = None,
            fidelity: Fidelity | None = None) -> Verdict:
    rows = [row("unquantized", None, 4000), row("sink_aware", 0.006), row("control", 0.0075)]
    paired = [] if low is None else [Paired(task="divergence", metric="kl", a="control", b="sink_aware",
                                            difference=0.0015, low=low, high=high)]
    left = {} if recovery is None else {"sink_aware": {"sink_cloze": {"acc": recovery, "acc_norm": 1.0}}}
    return judge(rows, paired, left, fidelity, gate or Gate())


@pytest.mark.parametrize(("low", "high", "answer"), [
    (0.001, 0.002, "pays"), (-0.002, -0.001, "does not pay"), (-0.001, 0.002, "no difference shown"),
    (0.0, 0.0, "no difference shown")])
def test_the_interval_decides(low: float, high: float, answer: str) -> None:
    found = verdict(low, high)
    assert found.answer == answer
    assert "0.006 nats" in found.sentence
    assert ("0.0075 for" in found.sentence) == (answer == "no difference shown")
    assert "same size" in found.sentence
    assert ("20 % less" in found.sentence) == (answer == "pays")
    assert len(re.findall(r"\d+(?:\.\d+)?", found.sentence)) == 2
    assert f"95 % interval {low:.2g} to {high:.2g}" in found.details[0]


def test_what_was_not_measured_is_not_claimed() -> None:
    assert verdict(None).answer == "not measured"
    assert "one row" in verdict(None).sentence
    alone = judge([row("sink_aware", None)], [], {}, None, Gate())
    assert (alone.answer, alone.gate) == ("not measured", None)
    assert "no control" in alone.sentence
    pair = judge([row("sink_aware", None), row("control", None)], [], {}, None, Gate())
    assert "no unquantized model" in pair.sentence


def test_the_gate_passes_and_fails_on_each_bound() -> None:
    rates = {"unquantized": {"0.3": 0.84}, "sink_aware": {"0.3": 0.80}}
    fidelity = Fidelity(sink_rate=rates, massive_peak={}, massive_ratio={})
    easy = Gate(max_divergence=0.01, min_recovery=0.9, max_sink_rate_change=0.1)
    assert verdict(0.001, 0.002, easy, 0.97, fidelity).gate == "passed"
    hard = Gate(max_divergence=0.001, min_recovery=0.99, max_sink_rate_change=0.01)
    found = verdict(0.001, 0.002, hard, 0.97, fidelity)
    assert found.gate == "failed"
    assert [failure.split("gate.")[1].split(" ")[0] for failure in found.failures] == [
        "max_divergence", "min_recovery", "max_sink_rate_change"]
    assert "sink_cloze acc " in found.failures[1]


def test_a_bound_that_was_not_measured_is_not_kept() -> None:
    gate = Gate(max_divergence=1.0, min_recovery=0.1, max_sink_rate_change=1.0)
    found = judge([row("sink_aware", None)], [], {}, None, gate)
    assert found.gate == "failed"
    assert len(found.failures) == 3
    assert all("was not measured" in failure for failure in found.failures)


@pytest.mark.parametrize(("assignments", "message"), [
    (["gate.max_divergence=1", "evaluate.skip=true"], "evaluate.skip"),
    (["gate.sinks=kept", "evaluate.fidelity=false"], "evaluate.fidelity=false"),
    (["gate.min_massive_overlap=0.5", "evaluate.fidelity=false"], "evaluate.fidelity=false")])
def test_a_bound_that_will_not_be_measured_is_refused_before(assignments: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        require_gate(Recipe().replace(assignments))


def test_bounds_that_will_be_measured_are_taken() -> None:
    require_gate(Recipe().replace(["evaluate.skip=true"]))
    require_gate(Recipe().replace(["gate.max_divergence=1", "gate.max_sink_rate_change=0.1",
                                   "evaluate.fidelity=false"]))
    require_gate(Recipe().replace(["gate.sinks=kept"]))


def test_a_metric_that_is_not_finite_is_not_kept() -> None:
    """It is left out of the row, and nothing passes unseen."""
    scores = {"mine": {"acc": Measure(value=0.5), "perplexity": Measure(value=9.0)}}
    rows = [row("unquantized", None), row("sink_aware", 0.01)]
    rows[0].tasks |= scores
    rows[1].tasks |= {"mine": {"acc": Measure(value=0.5)}}
    found = gate_failures(rows, {"sink_aware": {"mine": {"acc": 1.0}}}, None, Gate(min_recovery=0.9))
    assert found == ["mine perplexity of the result is not finite, so that gate.min_recovery is not kept"]


def test_a_recovery_that_is_not_defined_is_not_kept() -> None:
    """A mean log-likelihood, or an exact match that the unquantized model never gets."""
    rows = [row("unquantized", None), row("sink_aware", 0.01)]
    rows[0].tasks |= {"mine": {"acc": Measure(value=0.5), "score": Measure(value=-2.3)}}
    rows[1].tasks |= {"mine": {"acc": Measure(value=0.5), "score": Measure(value=-1000.0)}}
    said = ["recovery of mine score is not defined for -2.3 unquantized and -1000: gate.min_recovery is not kept"]
    assert gate_failures(rows, {"sink_aware": {"mine": {"acc": 1.0}}}, None, Gate(min_recovery=0.9)) == said
    for one in rows:
        del one.tasks["mine"]["acc"]
    assert gate_failures(rows, {}, None, Gate(min_recovery=0.9)) == said


def test_a_checkpoint_of_others_is_held_to_the_gate_too() -> None:
    rows = [row("unquantized", None), row("quantized", 0.01)]
    assert gate_failures(rows, {}, None, Gate(max_divergence=0.1)) == []
    assert len(gate_failures(rows, {}, None, Gate(max_divergence=0.001))) == 1
    assert gate_failures(rows, {"quantized": {"mine": {"acc": 0.99}}}, None, Gate(min_recovery=0.9)) == []


def test_the_gate_is_of_the_only_row_that_there_is() -> None:
    rows = [row("unquantized", None), row("control", 0.01)]
    assert gate_failures(rows, {}, None, Gate(max_divergence=0.1)) == []
    several = gate_failures([*rows, row("mine", 0.01)], {}, None, Gate(max_divergence=0.1))
    assert several == ["the gate is of the sink-aware row, which is not here"]
