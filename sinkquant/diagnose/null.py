"""The null of every figure: the same model on resampled text.

A figure that is a mean over rows of text is computed again on random halves of the rows. Where 95 % of those lie is
what the choice of text alone does; a difference inside of it says nothing about a model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sinkquant.artifacts.diagnosis import Measured

HALVES = 200
LEVEL = 0.95


def halves(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random halvings of `rows` rows: two int64 [HALVES, rows // 2], the indices of either half."""
    order = torch.rand(HALVES, rows, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    half = max(1, rows // 2)
    return order[:, :half], order[:, -half:]


def measured(values: torch.Tensor, seed: int) -> Measured:
    """The mean of a figure over rows, beside its means over random halves of the rows. `values`: [rows]."""
    values = values.double()
    first, _ = halves(len(values), seed)
    means = values[first].mean(1)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails).tolist()
    return Measured(value=float(values.mean()), low=low, high=high)


def self_distance(rows: int, seed: int, distance: Callable[[torch.Tensor, torch.Tensor], float]) -> float:
    """What 95 % of comparisons of a model with itself on other text stay within.

    Args:
        distance: of two sets of rows, each int64 indices [rows // 2]; at least 0.
    """
    return level_of([distance(a, b) for a, b in zip(*halves(rows, seed), strict=True)])


def level_of(distances: list[float]) -> float:
    """What 95 % of the distances stay within."""
    return float(torch.quantile(torch.tensor(distances, dtype=torch.float64), LEVEL))
