"""8-bit floating point (E4M3, as torch.float8_e4m3fn and engines have it): rounding to nearest, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.integer_scales import group_costs
from sinkquant.schemes.codecs.packed import PackedWeight, smallest

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SHARES = torch.linspace(0.5, 1.0, 17, dtype=torch.float32)
"""Scales that are tried, as shares of the one that reaches the largest weight: half of it is the same grid again, but
for its ends."""


@dataclass(frozen=True)
class FP8Codec(Codec):
    """Codes and scales as they stand."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """weight float8_e4m3fn [rows, columns], weight_scale [rows, 1], and input_scale [1] where it is static."""
        assert isinstance(weight, PackedWeight)
        inputs = {"input_scale": input_scale} if form.static_inputs and input_scale is not None else {}
        return {"weight": weight.codes, "weight_scale": weight.scale} | inputs

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> FP8Grid:
        """FP8 numbers."""
        return FP8Grid(scale_dtype)

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, [rows, columns] in `dtype`."""
        return PackedWeight(leaves["weight"], leaves["weight_scale"], form.bits).dequantized(dtype)


@dataclass(frozen=True)
class FP8Grid:
    """FP8 numbers times the scale of a row. With a search the scale is the one with the least squared error."""

    held: ClassVar[torch.dtype] = torch.float8_e4m3fn
    free_scales: ClassVar[bool] = True
    scale_dtype: torch.dtype = torch.bfloat16

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Round in place, what is too large to the largest."""
        return codes.copy_(codes.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn))

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale itself."""
        return scale.float()

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """In 16 bits, not zero, and no code times it overflows."""
        most = torch.finfo(self.scale_dtype).max / LARGEST
        return spread.clamp(smallest(self.scale_dtype), most).to(self.scale_dtype)

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """[rows, 1]: those that reach the largest |weight|, or with `search` those with the least weighted error."""
        best = reach = self.storable(weight.abs().amax(1, keepdim=True) / LARGEST)
        if not search:
            return reach
        cost = group_costs(weight, importance, weight.shape[1])
        least = torch.full(reach.shape, torch.inf, device=weight.device)
        for share in SHARES.flip(0).tolist():
            scale = self.storable(reach.float() * share)
            spread = scale.float()
            error = ((self.nearest_(weight / spread) * spread - weight).square() * cost).sum(1, keepdim=True)
            wins = error < least
            best, least = torch.where(wins, scale, best), torch.where(wins, error, least)
        return best

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
        """codes: float8_e4m3fn [rows, columns]; scale: [rows, 1]."""
        return PackedWeight(codes, scale, 8)
