"""Two plans of one model -> what they decide differently."""

from __future__ import annotations

from typing import Any

from sinkquant.artifacts import ModuleDecision, Plan, PredictedLoss, Sensitivity
from sinkquant.artifacts.frontier import ModuleChange, PlanDifference, PlanSummary
from sinkquant.errors import RequestError
from sinkquant.policy.expected import with_expected_loss

BESIDE = frozenset({"bytes", "reason"})
"""Fields of a decision that follow from the others."""
SETTINGS = ("blocks", "transforms", "silenced_heads", "calibration", "ends", "kv_cache", "kv_scheme", "seed",
            "loads_in")


def compare_plans(a: Plan, b: Plan, names: tuple[str, str] = ("a", "b"),
                  sensitivity: Sensitivity | None = None) -> PlanDifference:
    """Compare linear by linear, and what is decided for the model as a whole.

    Args:
        names: where the plans are from.
        sensitivity: predicts both losses; without it they are those that the plans carry.

    Raises:
        RequestError: the plans, or the sensitivities, are of different models.
    """
    foreign = sorted(set(a.modules) ^ set(b.modules))
    if foreign:
        raise RequestError(f"the plans are of different models: only {names[0 if foreign[0] in a.modules else 1]} has "
                           f"{foreign[0]}; compare two plans of one model.")
    if sensitivity is not None:
        a, b = with_expected_loss(a, sensitivity), with_expected_loss(b, sensitivity)
    losses = [{name: loss for loss in one.losses for name in loss.modules} for one in (a, b)]
    changes = []
    for name, one in a.modules.items():
        other = b.modules[name]
        changed = _changed(one.model_dump(mode="json"), other.model_dump(mode="json"))
        if changed:
            changes.append(ModuleChange(
                module=name, changed=changed, bytes=(one.bytes, other.bytes), reasons=(one.reason, other.reason),
                losses=(_loss(one, losses[0].get(name)), _loss(other, losses[1].get(name)))))
    settings: dict[str, tuple[Any, Any]] = {}
    for field in SETTINGS:
        ones, others = (one.model_dump(mode="json", include={field})[field] for one in (a, b))
        settings |= _changed(ones, others, field)
    return PlanDifference(a=_summary(a, names[0]), b=_summary(b, names[1]), modules=changes,
                          same=len(a.modules) - len(changes), settings=settings)


def _loss(decision: ModuleDecision, known: PredictedLoss | None) -> PredictedLoss | None:
    """What is left in 16 bits loses nothing, whether a plan predicts anything or not."""
    return PredictedLoss(modules=[], total=0.0, sinks=0.0) if decision.bits == 16 and known is None else known


def _changed(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Path -> both values, for every leaf of two JSON values that differs; lists of numbers are leaves."""
    if (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
            and all(isinstance(one, dict) for one in [*a, *b])):
        a, b = ({str(place): one for place, one in enumerate(ones)} for ones in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys(key for key in [*a, *b] if key not in BESIDE):
            found |= _changed(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if a == b else {path: (a, b)}


def _summary(plan: Plan, path: str) -> PlanSummary:
    return PlanSummary(path=path, name=plan.name, weight_bytes=plan.weight_bytes, bits_per_weight=plan.bits_per_weight,
                       kl=plan.predicted.get("kl"), kl_sinks=plan.predicted.get("kl_sinks"),
                       kv_bytes=None if plan.kv_cache is None else plan.kv_cache.bytes, loads_in=plan.loads_in)
