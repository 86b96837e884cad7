"""Sensitivities written by hand, for tests of what is made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from sinkquant.artifacts import EndLoss, FormatLoss, ModelShape, Sensitivity, Terms, UnitSensitivity


def sensitivity_of(shape: ModelShape, weight: dict[str, float] | None = None, bits: Iterable[int] = range(2, 9),
                   groups: Iterable[int] = (32,), ends: float = 0.0) -> Sensitivity:
    """Losses of 4^-bits times a weight (1 for modules that are not named), a tenth of them through sinks; smaller
    groups lose less. Head and embedding lose `ends` times 4^-bits each, and were not tried where that is 0."""
    units = []
    for name, linear in shape.linears.items():
        members = linear.fused_with or [name]
        if linear.fixed or members[0] != name:
            continue
        losses = []
        for one, group in itertools.product(bits, groups):
            total = (weight or {}).get(name, 1.0) * 4.0 ** -one * (1.0 if group == -1 else group / 100)
            losses.append(FormatLoss(bits=one, group_size=group, method="rtn", diagonal=1.0 / total, predicted=Terms(
                sinks=0.1 * total, others=0.9 * total, total=total)))
        units.append(UnitSensitivity(modules=members, losses=losses))
    of_ends = [EndLoss(kind=kind, bits=one, loss=ends * 4.0 ** -one) for kind in ("head", "embedding")  # type: ignore[arg-type]
               for one in range(2, 9)] if ends else []
    return Sensitivity(key="k", model="tiny", rows=1, length=1, sinks=["<s>"], sink_positions=1.0, units=units,
                       ends=of_ends)
