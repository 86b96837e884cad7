"""Wanda (Sun et al. 2306.11695): the weights that move a row's output least go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.pruning.masks import Pruned, least, least_of_groups


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
