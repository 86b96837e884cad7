"""Why a linear has its format, in a sentence with its figures."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from sinkquant.artifacts import FormatLoss, ModelShape, Sensitivity, SinkMap, UnitSensitivity
from sinkquant.policy.expected import loss_of
from sinkquant.policy.rules import Draft, affected, born_here
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat

NAMED = 4
"""No unit of an engine's fusing has more modules."""
HARDLY = 0.01
"""A smaller share of a loss is not worth a number."""


def found_in(shape: ModelShape, sink_map: SinkMap) -> dict[str, str]:
    """What the sinks do to the linears that they have to do with, in words: those that they dominate, and those that
    write a massive activation."""
    born = {name: words for name in shape.linears if (words := born_here(name, shape, sink_map))}
    return born | dict(affected(shape, sink_map))


def explained(choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap, recipe: Recipe,
              sensitivity: Sensitivity | None, done: Set[str]) -> dict[str, Draft]:
    """Complete the reasons: what was found in a linear, whether it is protected or not, and what its format and the
    next smaller one are predicted to lose.

    Args:
        sensitivity: null where nothing is known of losses; then the reason is all.
        done: linears whose reason is complete.
    """
    found = found_in(shape, sink_map)
    units = {name: unit for unit in (sensitivity.units if sensitivity else []) for name in unit.modules}
    known = {} if recipe.weights.rotate != "none" or recipe.weights.smooth != "none" else units
    chosen = dict(choices)
    for name, choice in choices.items():
        if name in done:
            continue
        parts = [choice.reason]
        if name in found and found[name] not in choice.reason:
            kept = choice.keep or not choice.quantized
            parts.append(found[name] if kept else f"no channel is kept for the sinks: {found[name]}")
        if sensitivity is not None and name in known:
            parts += _weighed(known[name], choice.form, sensitivity)
        chosen[name] = replace(choice, reason="; ".join(parts))
    return chosen


def sentence(unit: UnitSensitivity, form: WeightFormat, sensitivity: Sensitivity, why: str) -> str:
    """The reason of a format that was solved for: this format's loss, and that of the next smaller one that was given
    up."""
    bits = f"{form.bits} bits" if form.packed else "left in 16 bits"
    return "; ".join([f"{bits}, {why}" if why else bits, *_weighed(unit, form, sensitivity)])


def _weighed(unit: UnitSensitivity, form: WeightFormat, sensitivity: Sensitivity) -> list[str]:
    through = f"through {' and '.join(map(repr, sensitivity.sinks[:2]))}" if sensitivity.sinks else "through sinks"
    shared = ""
    if len(unit.modules) > NAMED:
        shared = f" for {len(unit.modules)} linears of experts together"
    elif len(unit.modules) > 1:
        shared = f" for {' + '.join(m.rpartition('.')[2] for m in unit.modules)} together"
    here, parts = loss_of(unit, form), []
    if here is not None:
        parts.append(f"predicted {_figures(here, through)}{shared}")
    below = _step_down(unit, form)
    if below is not None:
        grain = "one scale per channel" if below.group_size == -1 else f"groups of {below.group_size}"
        which = f"{below.bits} bits{f' and {grain}' if below.bits == form.bits else ''}"
        parts.append(f"at {which} {'predicted ' if here is None else ''}{_figures(below, through)}")
    return parts


def _step_down(unit: UnitSensitivity, form: WeightFormat) -> FormatLoss | None:
    """The largest of the candidates that are smaller than a format."""
    smaller = [loss for loss in unit.losses if _size(loss.form) < _size(form)]
    return max(smaller, key=lambda loss: _size(loss.form), default=None)


def _size(form: WeightFormat) -> float:
    """Bits per weight, up to what stands beside the codes."""
    return form.bits + (16 / form.group_size if form.group_size not in (None, -1) else 0.0)


def _figures(loss: FormatLoss, through: str) -> str:
    total, sinks = loss.terms.total, loss.terms.sinks
    share = f"of which {sinks:.2g}" if abs(sinks) >= HARDLY * total else "hardly any of it"
    return f"{total:+.2g} nats, {share} {through}"
