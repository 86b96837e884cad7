"""How many rows of text a verdict needs: looks at more and more rows, and the interval that is valid at each.

A group-sequential test (Jennison & Turnbull, Group Sequential Methods, 2000): the error that may be made, 5 %, is spent
look by look, little of it early: in proportion to the cube of the share of rows that are seen (Lan & DeMets 1983; Kim
& DeMets 1987 with exponent 3). A look's interval is over the paired differences of rows at the level that it spends:
Student's, and wherever that reaches further, Hall's, which corrects it for skewness (On the removal of skewness by
transformation, 1992). By the union bound all intervals of one difference hold together with 95 %, whatever the looks
have in common and whichever of them ends the test.

Assumed: rows are drawn at random from the text, and a mean of `FIRST_LOOK` or more paired differences is close to
normal but for its skewness. evals/results/adaptive.md has the error rates on differences of real models. Confidence
sequences for bounded means (Howard et al. 1810.08240, Waudby-Smith & Ramdas 2010.09686) assume less, but divergences
have no bound, and at 64 rows those intervals are several times as wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ERROR = 0.05
EXPONENT = 3
FIRST_LOOK = 8


@dataclass(frozen=True)
class Look:
    """One look at the first `rows` rows, whose interval may be wrong with probability `level`."""

    rows: int
    level: float


@dataclass(frozen=True)
class Estimate:
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
    return [Look(count, ERROR * ((count / total) ** EXPONENT - (before / total) ** EXPONENT))
            for before, count in zip([0, *rows], rows, strict=False)]


def interval(values: Sequence[float], level: float) -> Estimate:
    """Of the mean of `values`, Student's and Hall's together; the mean itself where all are equal.

    Raises:
        ValueError: fewer than two, whose spread nobody knows.
    """
    from scipy.stats import t  # large, and only evaluation needs it

    if len(values) < 2:
        raise ValueError("an interval needs two values.")
    found = np.asarray(values, dtype=np.float64)
    count = len(found)
    mean, error = float(found.mean()), float(found.std(ddof=1)) / count ** 0.5
    if error == 0:
        return Estimate(mean, mean, mean)
    reach = float(t.ppf(1 - level / 2, count - 1))
    skew = float(((found - mean) ** 3).mean()) / float(found.std(ddof=1)) ** 3
    low, high = (_unskewed(end, skew / count ** 0.5) for end in (-reach, reach))
    return Estimate(mean, mean - max(reach, high) * error, mean - min(-reach, low) * error)


def _unskewed(transformed: float, skew: float) -> float:
    """The studentised mean that Hall's transformation x + a x^2 + a^2 x^3 / 3 + skew / 6, a = skew / 3, takes to a
    value. `skew`: of the values, over the root of their number."""
    if abs(skew) < 1e-9:
        return transformed
    return (float(np.cbrt(1 + skew * (transformed - skew / 6))) - 1) * 3 / skew


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
