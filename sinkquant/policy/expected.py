"""What a plan is predicted to lose: the sum over its modules, from their sensitivities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sinkquant.artifacts import FormatLoss, Plan, PredictedLoss, Sensitivity, UnitSensitivity
from sinkquant.errors import RequestError
from sinkquant.policy.ends import bits_of_ends
from sinkquant.policy.kv_budget import expected_kv_loss
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat

SOLVED_FOR, PREDICTED, NOT_PREDICTED = "solved for the budget", "the predicted loss", "no loss is predicted"
"""What notes about a plan's loss begin with."""


@dataclass(frozen=True)
class ExpectedLoss:
    """KL divergence from the unquantized model, nats per token, and the sinks' part of it. `unknown`: modules whose
    format was no candidate, and that are not counted."""

    total: float
    sinks: float
    unknown: list[str]


def expect_loss(formats: Mapping[str, WeightFormat], sensitivity: Sensitivity,
                methods: Mapping[str, str] | None = None) -> ExpectedLoss:
    """What formats cost together: the sum over units, to second order. 16 bits cost nothing; smaller groups than were
    tried cost what the smallest tried ones do.

    Args:
        methods: module -> how it is rounded; without it the best method that was tried.
    """
    total = sinks = 0.0
    unknown = []
    known = {name for unit in sensitivity.units for name in unit.modules}
    for unit in sensitivity.units:
        form = formats[unit.modules[0]]
        if not form.packed:
            continue
        loss = loss_of(unit, form, None if methods is None else methods[unit.modules[0]])
        if loss is None:
            unknown += unit.modules
        else:
            total += loss.terms.total
            sinks += loss.terms.sinks
    unknown += [name for name, form in formats.items() if form.packed and name not in known]
    return ExpectedLoss(total, sinks, unknown)


def loss_of(unit: UnitSensitivity, form: WeightFormat, method: str | None = None) -> FormatLoss | None:
    """What a format costs by a method (None: the best), or at most costs; None where neither is known, and for 16
    bits."""
    return unit.loss(form, method) or _of_larger_groups(unit, form)


def _of_larger_groups(unit: UnitSensitivity, form: WeightFormat) -> FormatLoss | None:
    """What the same bits cost in the smallest groups that were tried and are larger: a bound."""
    if form.split or form.group_size == -1 or not form.packed:
        return None
    larger = [loss for loss in unit.tried(form) if loss.bits == form.bits and not loss.form.split
              and (loss.group_size == -1 or loss.group_size > (form.group_size or 0))]
    return min(larger, key=lambda loss: (math.inf if loss.group_size == -1 else loss.group_size, loss.terms.total),
               default=None)


def with_expected_loss(plan: Plan, sensitivity: Sensitivity, gap: float | None = None) -> Plan:
    """The plan with what it is predicted to lose among its predictions: `kl`, and `kl_sinks` through the sinks alone,
    in nats per token; `kl_ends`, a part of `kl`, by rounding the head and the embedding; `kl_kv` what its KV cache is,
    where that is known. What they leave out is said in the notes.

    Args:
        gap: the solver's, where the plan was solved for.

    Raises:
        RequestError: the sensitivities are of another model.
    """
    foreign = [name for unit in sensitivity.units for name in unit.modules if name not in plan.modules]
    if foreign:
        raise RequestError(f"the sensitivities are of another model: the plan has no {foreign[0]}; make them for this "
                           "one.")
    predicted = {key: value for key, value in plan.predicted.items() if not key.startswith("kl")}
    cache = expected_kv_loss(plan.kv_cache, sensitivity)
    of_cache = {} if cache is None or plan.transforms else {"kl_kv": cache}
    if not sensitivity.units:
        alone = [f"{NOT_PREDICTED}: the sensitivities are of the KV cache or of inputs alone"] if plan.formats else []
        return plan.model_copy(update={"predicted": predicted | of_cache, "losses": [], "notes": [*plan.notes, *alone]})
    found = expect_loss({name: decision.form for name, decision in plan.modules.items()}, sensitivity,
                        {name: decision.method for name, decision in plan.modules.items()})
    notes, recipe = list(plan.notes), Recipe.parse(plan.recipe)
    ends = sensitivity.end_loss(bits_of_ends(recipe)) if plan.ends else 0.0
    if gap is not None:
        predicted["solver_gap"] = gap
        ((key, limit),) = recipe.budget.limits.items()
        notes.append(f"{SOLVED_FOR} of {key} {limit:,} over {len(sensitivity.units)} modules or groups of "
                     f"them, with a gap of {gap:.2g} to the optimum")
    if plan.transforms:
        notes.append(f"{NOT_PREDICTED}: the sensitivities are of the weights before "
                     f"{' and '.join(transform.name for transform in plan.transforms)}")
        return plan.model_copy(update={"notes": notes})
    if found.unknown:
        notes.append(f"{NOT_PREDICTED}: {len(found.unknown)} quantized modules are in formats without a "
                     f"sensitivity, among them {found.unknown[0]}")
    else:
        predicted |= {"kl": found.total + (ends or 0.0), "kl_sinks": found.sinks}
        predicted |= {"kl_ends": ends} if plan.ends and ends is not None else {}
    predicted |= of_cache
    notes += [f"{PREDICTED} is that of the weights' formats; what {what} loses is not in it"
              for what in [*(["rounding the head and the embedding"] if ends is None else []),
                           *_left_out(plan, cache is not None)]]
    losses = [loss for unit in sensitivity.units if (loss := _of_unit(unit, plan)) is not None]
    return plan.model_copy(update={"predicted": predicted, "notes": notes, "losses": losses})


def _left_out(plan: Plan, cache_known: bool) -> list[str]:
    decisions = plan.modules.values()
    found = ["pruning"] if any(decision.prune is not None for decision in decisions) or plan.silenced_heads else []
    found += ["rounding inputs"] if any(decision.rounded for decision in decisions) else []
    return found + (["the KV cache"] if plan.kv_cache is not None and not cache_known else [])


def _of_unit(unit: UnitSensitivity, plan: Plan) -> PredictedLoss | None:
    """What a unit's format in the plan is predicted to lose; None where that is not known, or nothing."""
    decision = plan.modules[unit.modules[0]]
    loss = loss_of(unit, decision.form, decision.method)
    return None if loss is None else PredictedLoss(modules=unit.modules, total=loss.terms.total,
                                                   sinks=loss.terms.sinks)
