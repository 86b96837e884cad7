"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.packed import PackedWeight, group_scales, row_chunks, to_codes


@dataclass(frozen=True)
class RTN:
    """Every weight goes to the nearest code of its group's grid; needs no calibration."""

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16

    def quantize(self, weight: torch.Tensor) -> PackedWeight:
        """weight: float [rows, columns]."""
        codes, scales = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
        for rows in row_chunks(weight):
            scales.append(group_scales(weight[rows], self.bits, self.group_size, self.scale_dtype))
            codes[rows] = to_codes(weight[rows], scales[-1], self.bits)
        return PackedWeight(codes, torch.cat(scales), self.bits)
