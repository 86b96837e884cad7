"""What was predicted of plans and of a run, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sinkquant.artifacts import Forecast, Plan, Row

ALONE = {"sink_aware": "weights", "control": "weights_control"}
CACHE = {"sink_aware": "cache", "control": "cache_control"}
"""Row of a plan -> the row with its weights, or its KV cache, alone quantized, where both are."""
PREDICTED, TOOK = "predicted seconds: ", "seconds: "
"""What a stage of a run has in front of its name."""
UNKNOWN = "no loss is predicted: "


def forecasts_of_plans(rows: Sequence[Row], plans: Sequence[Plan]) -> list[Forecast]:
    """Bytes and loss of every plan that was evaluated."""
    by_name = {row.name: row for row in rows}
    found = []
    for plan in plans:
        row = by_name.get(plan.name)
        if row is None:
            continue
        found.append(Forecast(row=plan.name, quantity="weight_bytes", predicted=float(plan.weight_bytes),
                              measured=float(row.weight_bytes)))
        alone = by_name.get(ALONE.get(plan.name, ""), row)
        found.append(Forecast(row=plan.name, quantity="kl", predicted=plan.predicted.get("kl"), measured=_loss(alone),
                              note=_note(plan, alone is row)))
        cache = by_name.get(CACHE.get(plan.name, ""))
        if "kl_kv" in plan.predicted and cache is not None:
            found.append(Forecast(row=plan.name, quantity="kl_kv", predicted=plan.predicted["kl_kv"],
                                  measured=_loss(cache)))
    return found


def forecasts_of_run(resources: Mapping[str, float]) -> list[Forecast]:
    """Seconds per stage and peak memory, from a run's resources."""
    found = []
    for name, predicted in resources.items():
        stage = name.removeprefix(PREDICTED)
        if stage != name and f"{TOOK}{stage}" in resources:
            found.append(Forecast(row="run", quantity=f"seconds to {stage}", predicted=predicted,
                                  measured=resources[f"{TOOK}{stage}"]))
    if "predicted peak resident bytes" in resources:
        found.append(Forecast(row="run", quantity="peak resident bytes",
                              predicted=resources["predicted peak resident bytes"],
                              measured=resources.get("peak resident bytes")))
    return found


def _loss(row: Row) -> float | None:
    measure = row.tasks.get("divergence", {}).get("kl")
    return None if measure is None else measure.value


def _note(plan: Plan, whole: bool) -> str:
    if "kl" not in plan.predicted:
        why = next((note.removeprefix(UNKNOWN) for note in plan.notes if note.startswith(UNKNOWN)),
                   "the plan was made without sensitivities (--sensitivity FILE, or a budget that is solved for)")
        return f"not predicted: {why}"
    beside = [note for note in plan.notes if note.startswith("the predicted loss is that of the weights' formats")]
    return "; ".join(note for note in beside if whole or "KV cache" not in note)
