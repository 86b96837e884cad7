"""Exactly so many of the smallest scores: the masks that all methods share."""

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
