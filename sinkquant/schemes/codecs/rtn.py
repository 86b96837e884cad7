"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes.codecs.integer_scales import searched_scales
from sinkquant.schemes.codecs.packed import PackedWeight, group_scales, row_chunks, to_codes


@dataclass(frozen=True)
class RTN:
    """Every weight goes to the nearest code of its group's grid; needs no calibration.

    With `scale_search` the grid is the one with the least squared error, each column weighted by the mean square of
    its inputs where calibration gives it.
    """

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16
    scale_search: bool = True

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> PackedWeight:
        """weight: float [rows, columns]; importance: [columns], the diagonal of the Hessian, or None."""
        codes, scales = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
        for rows in row_chunks(weight):
            if self.scale_search:
                part = searched_scales(weight[rows], self.bits, self.group_size, self.scale_dtype, importance)
            else:
                part = group_scales(weight[rows], self.bits, self.group_size, self.scale_dtype)
            scales.append(part)
            codes[rows] = to_codes(weight[rows], part, self.bits)
        return PackedWeight(codes, torch.cat(scales), self.bits)
