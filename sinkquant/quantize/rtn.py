"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.packed import PackedWeight, group_scales, to_codes


@dataclass(frozen=True)
class RTN:
    """Every weight goes to the nearest code of its group's grid; needs no calibration."""

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16

    def quantize(self, weight: torch.Tensor) -> PackedWeight:
        """weight: float [rows, columns]."""
        scale = group_scales(weight, self.bits, self.group_size, self.scale_dtype)
        return PackedWeight(to_codes(weight, scale, self.bits), scale, self.bits)
