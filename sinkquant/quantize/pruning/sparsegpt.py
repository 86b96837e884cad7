"""SparseGPT (Frantar & Alistarh 2301.00774): prune column by column and let the columns to come make up for it."""

from __future__ import annotations

import torch

from sinkquant.quantize.factor import damped_hessian, inverse_factor
from sinkquant.quantize.pruning.masks import Pruned, least

BLOCK = 128
"""Columns whose zeros are chosen together without a pattern (the paper's adaptive mask selection, section 3.3)."""


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, group: tuple[int, int] | None = None,
              damping: float = 0.01, name: str = "weight") -> Pruned:
    """Zeros where w^2 / [H^-1] is smallest, the errors made up for by the columns to the right (algorithm 1).

    Without a pattern every block of 128 columns loses the same share, its rows as they come; with a `group` (n, m)
    every m consecutive weights of a row lose m - n. Either choice is made when its columns are reached, from weights
    that already make up for earlier zeros.

    Args:
        weight: float [rows, columns]. hessian: [columns, columns], symmetric, any scale.
        sparsity: int(sparsity * rows * 128) weights of every block go without a pattern, of the last one as its width
            says.

    Raises:
        SinkquantError: the Hessian is not finite, or not positive definite with this damping.
    """
    damped, _ = damped_hessian(hessian, damping, name)
    inverse = inverse_factor(damped, damping, name)
    work = weight.float().clone()
    zeros = torch.zeros(work.shape, dtype=torch.bool, device=work.device)
    for start, stop in _blocks(work.shape[1], group):
        errors = torch.zeros(len(work), stop - start, device=work.device)
        if group is None:
            scores = _scores(work[:, start:stop], inverse.diagonal()[start:stop])
            zeros[:, start:stop] = least(scores.flatten(), int(sparsity * scores.numel())).reshape(scores.shape)
        for i in range(start, stop):
            if group is not None and i % group[1] == 0:
                end = i + group[1]
                zeros[:, i:end] = least(_scores(work[:, i:end], inverse.diagonal()[i:end]), group[1] - group[0])
            error = work[:, i] * zeros[:, i] / inverse[i, i]
            work[:, i + 1:stop] -= error[:, None] * inverse[i, i + 1:stop]
            errors[:, i - start] = error
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return Pruned(work.masked_fill(zeros, 0), ~zeros)


def _blocks(columns: int, group: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Blocks of whole groups, so that a group's weights are up to date when it is reached."""
    size = group[1] if group else 1
    step = max(1, BLOCK // size) * size
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def _scores(weight: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """What a zero costs after all later columns have made up for it. diagonal: [columns], of the inverse's factor."""
    return (weight / diagonal).square()
