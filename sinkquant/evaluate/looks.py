"""How many rows of text a verdict needs: looks at more and more rows, and the interval that is valid at each.

A group-sequential test (Jennison & Turnbull, Group Sequential Methods, 2000): the error that may be made, 5 %, is spent
look by look in proportion to the rows that are seen (Lan & DeMets 1983; Kim & DeMets 1987 with exponent 1). A look's
interval is Student's over the paired differences of rows at the level that the look spends. By the union bound all
intervals hold together with 95 %, whatever the looks have in common and whichever of them ends the test.

Assumed: rows are drawn at random from the text, and a mean of `FIRST_LOOK` or more paired differences is close to
normal. evals/results/adaptive.md has the error rates on differences of real models. Confidence sequences for bounded
means (Howard et al. 1810.08240, Waudby-Smith & Ramdas 2010.09686) assume less, but divergences have no bound, and at 64
rows those intervals are several times as wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ERROR = 0.05
FIRST_LOOK = 8


@dataclass(frozen=True)
class Look:
    """One look at the first `rows` rows, whose interval may be wrong with probability `level`."""

    rows: int
    level: float


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the sign is."""
        return self.low > 0 or self.high < 0


def looks(total: int, precision: float | None) -> list[Look]:
    """8, 16, 32, ... rows and all of them; one look where there is no precision to stop at.

    Args:
        total: rows that there are.
    """
    rows = [total]
    while precision is not None and rows[0] >= 2 * FIRST_LOOK:
        rows.insert(0, max(FIRST_LOOK, (rows[0] + 1) // 2))
    return [Look(count, ERROR * (count - before) / total)
            for before, count in zip([0, *rows], rows, strict=False)]


def interval(values: Sequence[float], level: float) -> Interval:
    """Of the mean of `values`; the mean itself where all are equal.

    Raises:
        ValueError: fewer than two, whose spread nobody knows.
    """
    from scipy.stats import t  # large, and only evaluation needs it

    if len(values) < 2:
        raise ValueError("an interval needs two values.")
    found = np.asarray(values, dtype=np.float64)
    mean, error = float(found.mean()), float(found.std(ddof=1)) / len(found) ** 0.5
    half = float(t.ppf(1 - level / 2, len(found) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def settled(a: Sequence[float], b: Sequence[float], level: float, precision: float) -> bool:
    """Whether more rows would change nothing about a - b: its sign is certain, or it is known to `precision` times the
    larger of the two means."""
    found = interval([x - y for x, y in zip(a, b, strict=True)], level)
    return found.certain or found.high - found.low <= 2 * precision * max(float(np.mean(a)), float(np.mean(b)))


def known(values: Sequence[float], level: float, precision: float, bound: float | None = None) -> bool:
    """Whether a mean is known to `precision` times itself; with a `bound`, whether its side of it is certain."""
    found = interval(values, level)
    if bound is not None:
        return not found.low <= bound <= found.high
    return found.high - found.low <= 2 * precision * abs(found.mean)
