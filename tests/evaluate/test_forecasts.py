"""What was predicted beside what came of it: of every plan that was evaluated, and of the run."""

from __future__ import annotations

from types import SimpleNamespace

from sinkquant.artifacts import Measure, Row
from sinkquant.evaluate import forecasts_of_plans, forecasts_of_run


def row(name: str, kl: float | None) -> Row:
    tasks = {} if kl is None else {"divergence": {"kl": Measure(value=kl)}}
    return Row(name=name, path=name, weight_bytes=101, bits_per_weight=4.0, tasks=tasks)


def plan(name: str, *notes: str, **predicted: float):
    return SimpleNamespace(name=name, weight_bytes=100, predicted=predicted, notes=list(notes))


def test_loss_is_that_of_the_weights_where_they_were_measured_alone() -> None:
    cache = "the predicted loss is that of the weights' formats; what the KV cache loses is not in it"
    inputs = cache.replace("the KV cache", "rounding inputs")
    rows = [row("unquantized", None), row("sink_aware", 0.5), row("control", 0.7), row("weights", 0.2),
            row("cache", 0.4)]
    found = forecasts_of_plans(rows, [plan("sink_aware", cache, inputs, kl=0.1, kl_kv=0.3),
                                      plan("control", cache, kl=0.3), plan("elsewhere", kl=1.0)])
    assert [(one.row, one.quantity, one.predicted, one.measured) for one in found] == [
        ("sink_aware", "weight_bytes", 100, 101), ("sink_aware", "kl", 0.1, 0.2), ("sink_aware", "kl_kv", 0.3, 0.4),
        ("control", "weight_bytes", 100, 101), ("control", "kl", 0.3, 0.7)]
    assert [one.note for one in found] == ["", inputs, "", "", cache]


def test_what_was_not_predicted_or_not_measured_is_null_with_the_reason() -> None:
    found = forecasts_of_plans([row("sink_aware", None), row("control", 0.1)], [
        plan("sink_aware"), plan("control", "no loss is predicted: 3 modules are in formats without a sensitivity")])
    first, second = (one for one in found if one.quantity == "kl")
    assert (first.predicted, first.measured, second.predicted, second.measured) == (None, None, None, 0.1)
    assert first.note.startswith("not predicted: the plan was made without sensitivities")
    assert second.note == "not predicted: 3 modules are in formats without a sensitivity"


def test_seconds_and_memory_of_a_run() -> None:
    found = forecasts_of_run({"seconds: detect": 2.0, "seconds: detect sink_aware": 9.0,
                              "seconds: quantize sink_aware": 3.0, "seconds: quantize control": 4.0,
                              "predicted seconds: detect": 1.0, "predicted seconds: quantize sink_aware": 2.0,
                              "predicted seconds: quantize control": 5.0, "predicted seconds: evaluate": 6.0,
                              "peak resident bytes": 5.0, "predicted peak resident bytes": 6.0})
    assert [(one.quantity, one.predicted, one.measured) for one in found] == [
        ("seconds to detect", 1.0, 2.0), ("seconds to quantize sink_aware", 2.0, 3.0),
        ("seconds to quantize control", 5.0, 4.0), ("peak resident bytes", 6.0, 5.0)]
    assert forecasts_of_run({}) == []
