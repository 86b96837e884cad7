"""What a kind of protection is predicted to be worth, and what to say of it."""

from __future__ import annotations

from collections.abc import Sequence

from sinkquant.artifacts import KVCachePlan, Plan, Sensitivity
from sinkquant.artifacts.advice import Answer, MeasuredWorth, MechanismAdvice, PredictedWorth
from sinkquant.errors import RequestError
from sinkquant.policy.expected import expect_loss
from sinkquant.policy.kv_budget import expected_kv_loss
from sinkquant.policy.mechanisms import Mechanism
from sinkquant.schemes import scheme_of


def formats_of(plans: Sequence[Plan]) -> list[str]:
    """Recipe assignments that make the formats of some plans candidates of their sensitivities.

    Raises:
        RequestError: they have formats without sensitivities, or weights that are changed before.
    """
    for plan in plans:
        changed = [transform.name for transform in plan.transforms if transform.name != "scale"]
        if changed:
            raise RequestError(f"sensitivities are of the weights before {' and '.join(changed)}.")
    forms = {form for plan in plans for form in plan.formats.values()}
    if not all(scheme_of(form).integers or scheme_of(form).solvable for form in forms):
        raise RequestError("there are no sensitivities of floating-point weights, nor of bitsandbytes and quanto.")
    return [f"sensitivity.bits={sorted({form.bits for form in forms})}", "sensitivity.measure_rows=0",
            f"sensitivity.group_sizes={sorted({int(form.group_size or -1) for form in forms})}"]


def predicted_worth(one: Mechanism, base: Sensitivity, own: Sensitivity) -> PredictedWorth | None:
    """Both losses, to second order; None where a format is unknown, or where something else than the weights' formats
    and all sinks makes the difference.

    Args:
        base: with every token weighing the same. own: with the statistics, or the columns beside the codes, of the
            mechanism.
    """
    if one.aware is None or one.control is None or one.exact_sinks == "some" or one.name.startswith("static ranges"):
        return None
    losses = []
    for plan, costs in ((one.aware, own), (one.control, base)):
        found = expect_loss({name: decision.form for name, decision in plan.modules.items()}, costs)
        if found.unknown:
            return None
        scaled = sum(loss.terms.sinks for unit in costs.units
                     if any(plan.modules[name].keep == "scale" for name in unit.modules)
                     and (loss := unit.loss(plan.modules[unit.modules[0]].form)))
        exact = one.exact_sinks == "both" or (one.exact_sinks == "aware" and plan is one.aware)
        losses.append(found.total - (found.sinks if exact else scaled))
    at_best = one.exact_sinks != "none" or any(d.keep == "scale" for d in one.aware.modules.values())
    return PredictedWorth(aware=losses[0], control=losses[1], at_best=at_best)


def cache_candidates(plan: KVCachePlan, length: int) -> list[str]:
    """Recipe assignments that make sensitivities tell what the bits of a cache lose in rows of `length` tokens, and
    hardly anything of the weights."""
    bits = sorted({bits for layer in plan.layers for bits in layer.key_bits + layer.value_bits if bits < 16})
    return [f"sensitivity.kv_bits={bits}", f"sensitivity.kv_length={length}", "sensitivity.kv_rows=8",
            "sensitivity.kv_repeated=false", "sensitivity.rows=1", "sensitivity.bits=[8]",
            "sensitivity.group_sizes=[-1]", "sensitivity.measure_rows=0", "weights.method=rtn",
            "weights.scale_search=false"]


def predicted_cache_worth(one: Mechanism, base: Sensitivity, own: Sensitivity) -> PredictedWorth | None:
    """Both losses of the KV cache, to second order; null where a number of bits was not tried."""
    if one.aware is None or one.control is None:
        return None
    aware = expected_kv_loss(one.aware.kv_cache, own)
    control = expected_kv_loss(one.control.kv_cache, base)
    return None if aware is None or control is None else PredictedWorth(aware=aware, control=control)


def judged(one: Mechanism, predicted: PredictedWorth | None, measured: MeasuredWorth | None) -> tuple[Answer, str]:
    """The answer and a sentence with its figures."""
    if not one.possible:
        return "not possible", f"Not possible: {one.why}."
    if one.aware is None:
        return "nothing here", f"Nothing here: {one.why}."
    forecast = "nothing is predicted" if predicted is None else (
        f"predicted{' at best' if predicted.at_best else ''} {predicted.gain:+.2g} nats of {predicted.control:.2g}")
    if measured is None:
        return "not measured", f"Not measured; {forecast}."
    share = f" ({measured.gain / measured.control:+.0%})" if measured.control > 0 else ""
    figures = (f"{measured.control:.4g} nats without it and {measured.aware:.4g} with it: {measured.gain:+.2g}{share}, "
               f"95 % interval {measured.low:+.2g} to {measured.high:+.2g}; {forecast}")
    if measured.low > 0:
        return "pays", f"Pays: {figures}."
    if measured.high < 0:
        return "does not pay", f"Does not pay: {figures}."
    return "nothing here", f"Nothing here, the interval includes zero: {figures}."


def overall(advice: Sequence[MechanismAdvice], sinks: Sequence[str], measured: bool) -> str:
    """What to do, in two sentences."""
    first = (f"The sinks are {', '.join(map(repr, sinks))}." if sinks else
             "No sink was found in this model on this text.")
    if measured:
        gains = [(one.measured.gain, f"{one.name} for the {one.applies_to}") for one in advice
                 if one.answer == "pays" and one.measured is not None]
        if not gains:
            return f"{first} Nothing here: no protection beats its control of the same bytes."
        parts = [f"{name} ({gain:.2g} nats less)" for gain, name in sorted(gains, reverse=True)]
        return f"{first} Worth it here, each alone: {', '.join(parts)}."
    best = [(one.predicted.gain, "at best " if one.predicted.at_best else "", f"{one.name} for the {one.applies_to}")
            for one in advice if one.predicted is not None and one.predicted.gain > 0]
    if not best:
        return f"{first} No gain is predicted; measuring tells what cannot be predicted."
    parts = [f"{name} ({bound}{gain:.2g} nats less)" for gain, bound, name in sorted(best, reverse=True)]
    return f"{first} Predicted gains, not measured yet: {', '.join(parts)}."
