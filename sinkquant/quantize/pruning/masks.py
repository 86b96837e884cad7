"""Exactly so many of the smallest scores: the masks that all methods share, and the methods that are no more than that.

Of a method, `group` is (n, m) for an n:m pattern, None for an unstructured one of `sparsity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pruned:
    """weight: [rows, columns], zero where it is pruned; kept: bool [rows, columns], where it is not."""

    weight: torch.Tensor
    kept: torch.Tensor


def least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool, the shape of `scores`: exactly the `count` smallest along the last dimension; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def least_of_groups(scores: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """bool [rows, columns]: the m - n smallest of every m consecutive columns. `group`: (n, m), m divides columns."""
    kept, size = group
    return least(scores.unflatten(1, (-1, size)), size - kept).flatten(1)


def magnitude(weight: torch.Tensor, sparsity: float, group: tuple[int, int] | None = None) -> Pruned:
    """Zeros where |W| is smallest, over the whole matrix or in every group of m; needs no calibration.

    Args:
        weight: float [rows, columns]. int(sparsity * rows * columns) weights go without a pattern.
    """
    scores = weight.float().abs()
    zeros = least(scores.flatten(), int(sparsity * weight.numel())).reshape(weight.shape) if group is None else (
        least_of_groups(scores, group))
    return Pruned(weight.masked_fill(zeros, 0), ~zeros)


def wanda(weight: torch.Tensor, energy: torch.Tensor, sparsity: float,
          group: tuple[int, int] | None = None) -> Pruned:
    """Zeros where |W| * ||X||_2 is smallest in every output row, or in every group of m (Sun et al. 2306.11695,
    section 3). Where no token came (no energy at all) all columns count alike.

    Args:
        weight: float [rows, columns]. int(sparsity * columns) weights of every row go without a pattern.
        energy: [columns], the sum or mean of squares of every input column, tokens weighted by the calibration's
            policy.
    """
    norms = energy.double().clamp(min=0).sqrt()
    largest = float(norms.max())
    # Over the largest, so that no product leaves float32's range.
    norms = norms / largest if largest > 0 else torch.ones_like(norms)
    scores = weight.float().abs() * norms.float()
    zeros = least(scores, int(sparsity * weight.shape[1])) if group is None else least_of_groups(scores, group)
    return Pruned(weight.masked_fill(zeros, 0), ~zeros)
