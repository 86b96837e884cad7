"""SparseGPT (Frantar & Alistarh 2301.00774): prune column by column and let the columns to come make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.factor import damped_hessian, inverse_factor
from sinkquant.quantize.pruning.masks import Pruned, least

BLOCK = 128
"""Columns whose zeros are chosen together without a pattern (the paper's adaptive mask selection, section 3.3)."""


@dataclass(frozen=True)
class SparseGPT:
    """Zeros where w^2 / [H^-1] is smallest, the errors made up for by the columns to the right (algorithm 1).

    Without a pattern every block of 128 columns loses the same share, its rows as they come; with (n, m) every group
    of m consecutive weights of a row loses m - n. Either choice is made when its columns are reached, from weights that
    already make up for earlier zeros.
    """

    sparsity: float
    group: tuple[int, int] | None = None
    damping: float = 0.01

    def prune(self, weight: torch.Tensor, hessian: torch.Tensor, name: str = "weight") -> Pruned:
        """weight: float [rows, columns]; hessian: [columns, columns], symmetric, any scale.

        int(sparsity * rows * 128) weights of every block go without a pattern, of the last one as its width says.

        Raises:
            SinkquantError: the Hessian is not finite, or not positive definite with this damping.
        """
        damped, _ = damped_hessian(hessian, self.damping, name)
        inverse = inverse_factor(damped, self.damping, name)
        work = weight.float().clone()
        zeros = torch.zeros(work.shape, dtype=torch.bool, device=work.device)
        for start, stop in self._blocks(work.shape[1]):
            errors = torch.zeros(len(work), stop - start, device=work.device)
            if self.group is None:
                zeros[:, start:stop] = self._anywhere(work[:, start:stop], inverse.diagonal()[start:stop])
            for i in range(start, stop):
                if self.group is not None and i % self.group[1] == 0:
                    end = i + self.group[1]
                    zeros[:, i:end] = least(_scores(work[:, i:end], inverse.diagonal()[i:end]),
                                            self.group[1] - self.group[0])
                error = work[:, i] * zeros[:, i] / inverse[i, i]
                work[:, i + 1:stop] -= error[:, None] * inverse[i, i + 1:stop]
                errors[:, i - start] = error
            work[:, stop:] -= errors @ inverse[start:stop, stop:]
        return Pruned(work.masked_fill(zeros, 0), ~zeros)

    def _blocks(self, columns: int) -> list[tuple[int, int]]:
        """Blocks of whole groups, so that a group's weights are up to date when it is reached."""
        size = self.group[1] if self.group else 1
        step = max(1, BLOCK // size) * size
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]

    def _anywhere(self, block: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
        scores = _scores(block, diagonal)
        return least(scores.flatten(), int(self.sparsity * block.numel())).reshape(block.shape)


def _scores(weight: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """What a zero costs after all later columns have made up for it. diagonal: [columns], of the inverse's factor."""
    return (weight / diagonal).square()
