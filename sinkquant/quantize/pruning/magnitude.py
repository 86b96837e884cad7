"""Magnitude pruning (Han et al. 1506.02626): the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.pruning.masks import Pruned, least, least_of_groups


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
