"""A dot plot: one line per model on a common axis, with its interval, what it weighs beside it as text.

It is drawn by the page itself: its text is text, and it fits a phone, a desk and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.ticker import MaxNLocator

LOGARITHMIC = 30
"""An axis is logarithmic where the largest value is over so many times the smallest: on a linear one the smallest would
lie on zero."""
MARGIN = 3.0
"""Percent of the axis on both sides that no value reaches, so that dots and figures of the axis are not cut."""


@dataclass(frozen=True)
class Dot:
    """A line of the plot.

    `cells`: the texts of the columns before the dot. `value`, `low`, `high`: on the axis; null where there is nothing
    to draw. `text`: the figure as text. `kind`: "ours", "control", or "" for all else; `hollow`: drawn as a ring.
    """

    name: str
    cells: list[str]
    value: float | None
    low: float
    high: float
    text: str
    kind: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """What places figures, in percent of the width."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float], reach: Sequence[float], linear: bool = False) -> Axis:
        """An axis that shows `values` and the ends of their intervals, `reach`, and zero where it is linear."""
        ends = [*values, *reach, 0.0]
        if not linear and min(values) > 0 and max(values) > LOGARITHMIC * min(values):
            return cls(min(v for v in (*values, *reach) if v >= min(values) / 2), max(ends), True)
        return cls(min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1)

    def place(self, value: float) -> float:
        """Percent from the left; what is off the axis stands at its end."""
        if self.logarithmic:
            value, low, high = (math.log(max(v, self.low)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        share = (value - low) / (high - low)
        return round(MARGIN + (100 - 2 * MARGIN) * min(max(share, 0.0), 1.0), 2)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(percent, text) of the figures under the axis, `most` and one at most."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 3) if 2 * math.log10(self.high / self.low) < most else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            found = MaxNLocator(nbins=most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
            values = [float(value) for value in found]
        shown = [value for value in values if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]
        return [(self.place(value), f"{value:.6g}") for value in shown]


@dataclass(frozen=True)
class Dots:
    """A dot plot. `columns` name what stands before the dot, `quantity` the axis. `mark`: a value with a name that a
    line is drawn at. `linear`: the axis is, whatever its values are: differences have a zero. `ticks`: figures under
    the axis, one less. `lines`: what every line is."""

    title: str
    columns: list[str]
    quantity: str
    dots: list[Dot]
    caption: str = ""
    mark: tuple[float, str] | None = None
    linear: bool = False
    ticks: int = 6
    lines: str = "model"
    axis: Axis = field(init=False)

    def __post_init__(self) -> None:
        values = [dot.value for dot in self.dots if dot.value is not None]
        reach = [end for dot in self.dots if dot.value is not None for end in (dot.low, dot.high)]
        if self.mark is not None and self.mark[0] > 0:
            values.append(self.mark[0])
        object.__setattr__(self, "axis", Axis.of(values or [1.0], reach, self.linear))

    @property
    def alt(self) -> str:
        """The plot in words."""
        return f"{self.quantity}: " + "; ".join(
            f"{dot.name} {dot.text}" for dot in self.dots if dot.value is not None) + "."
