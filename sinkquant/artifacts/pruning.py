"""Pruning: which weights of a linear are set to zero, as a plan says it."""

from __future__ import annotations

from typing import Literal

from sinkquant.artifacts.base import Strict

PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]


class Pruning(Strict):
    """`sparsity` is the share of the weights that become zero. `pattern` "unstructured" lets them lie anywhere; "n:m"
    keeps n of every m consecutive weights of a row, and sparsity is then 1 - n / m."""

    method: PruneMethod
    sparsity: float
    pattern: str

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" pattern, null without one."""
        return pattern_group(self.pattern)

    @property
    def needs_rows(self) -> bool:
        """Whether it takes calibration rows."""
        return self.method != "magnitude"


def pattern_group(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", null for "unstructured".

    Raises:
        ValueError: it is neither, or not 0 < n < m.
    """
    if pattern == "unstructured":
        return None
    kept, colon, size = pattern.partition(":")
    if not (colon and kept.isdecimal() and size.isdecimal() and 0 < int(kept) < int(size)):
        raise ValueError("a pattern is 'unstructured', or 'n:m' with 0 < n < m, such as '2:4'")
    return int(kept), int(size)
