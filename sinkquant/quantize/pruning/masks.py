"""Exactly so many of the smallest scores: the masks that all methods share, and the methods that are no more than that.
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


@dataclass(frozen=True)
class Magnitude:
    """Zeros where |W| is smallest, over the whole matrix or in every group of m; needs no calibration.

    `group`: (n, m) for an n:m pattern, None for an unstructured one of `sparsity`.
    """

    sparsity: float
    group: tuple[int, int] | None = None

    def prune(self, weight: torch.Tensor) -> Pruned:
        """weight: float [rows, columns]. int(sparsity * rows * columns) weights go without a pattern."""
        scores = weight.float().abs()
        if self.group is None:
            zeros = least(scores.flatten(), int(self.sparsity * weight.numel())).reshape(weight.shape)
        else:
            zeros = least_of_groups(scores, self.group)
        return Pruned(weight.masked_fill(zeros, 0), ~zeros)


@dataclass(frozen=True)
class Wanda:
    """Zeros where |W| * ||X||_2 is smallest in every output row, or in every group of m (section 3).

    `group`: (n, m) for an n:m pattern, None for an unstructured one of `sparsity`.
    """

    sparsity: float
    group: tuple[int, int] | None = None

    def prune(self, weight: torch.Tensor, energy: torch.Tensor) -> Pruned:
        """weight: float [rows, columns]; energy: [columns], the sum or mean of squares of every input column, tokens
        weighted by the calibration's policy. int(sparsity * columns) weights of every row go without a pattern.

        Where no token came (no energy at all) all columns count alike.
        """
        norms = energy.double().clamp(min=0).sqrt()
        largest = float(norms.max())
        # Over the largest, so that no product leaves float32's range.
        norms = norms / largest if largest > 0 else torch.ones_like(norms)
        scores = weight.float().abs() * norms.float()
        if self.group is None:
            zeros = least(scores, int(self.sparsity * weight.shape[1]))
        else:
            zeros = least_of_groups(scores, self.group)
        return Pruned(weight.masked_fill(zeros, 0), ~zeros)
