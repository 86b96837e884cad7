"""Round to nearest, in any number format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes.codecs.grid import Grid, IntegerGrid
from sinkquant.schemes.codecs.packed import PackedWeight, row_chunks


@dataclass(frozen=True)
class Nearest:
    """Every weight goes to the nearest code of its group; needs no calibration.

    With `scale_search` scales are those with the least squared error, each column weighted by the mean square of its
    inputs where calibration gives it.
    """

    grid: Grid
    scale_search: bool = True

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> PackedWeight:
        """weight: float [rows, columns]; importance: [columns], the diagonal of the Hessian, or None."""
        codes, scales = torch.empty(weight.shape, dtype=self.grid.held, device=weight.device), []
        for rows in row_chunks(weight):
            part = weight[rows].float()
            scale = self.grid.scales(part, importance, self.scale_search)
            real = part.unflatten(1, (scale.shape[1], -1)) / self.grid.spread(scale)[..., None]
            codes[rows] = self.grid.nearest_(real, scale[..., None]).flatten(1).to(self.grid.held)
            scales.append(scale)
        return self.grid.weight(codes, torch.cat(scales))


def to_integers(bits: int, group_size: int, scale_dtype: torch.dtype = torch.bfloat16,
                scale_search: bool = True) -> Nearest:
    """Rounding to integers in groups of so many columns; -1: one group per row."""
    return Nearest(IntegerGrid(bits, scale_dtype, group_size), scale_search)
