"""8-bit floating point (E4M3, as torch.float8_e4m3fn and engines have it): rounding to nearest, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.packed import PackedWeight, row_chunks

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SHARES = torch.linspace(0.5, 1.0, 17)
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

    def nearest(self, form: WeightFormat, scale_dtype: torch.dtype, scale_search: bool,
                fused_scale: torch.Tensor | None = None) -> FP8:
        """To the nearest FP8 number."""
        return FP8(scale_dtype, scale_search)

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, [rows, columns] in `dtype`."""
        return PackedWeight(leaves["weight"], leaves["weight_scale"], form.bits).dequantized(dtype)


@dataclass(frozen=True)
class FP8:
    """Every weight goes to the nearest FP8 number times the scale of its row.

    With `scale_search` the scale is the one with the least squared error, each column weighted by the mean square of
    its inputs where calibration gives it.
    """

    scale_dtype: torch.dtype = torch.bfloat16
    scale_search: bool = True

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> PackedWeight:
        """weight: float [rows, columns]; importance: [columns], the diagonal of the Hessian, or None."""
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = []
        for rows in row_chunks(weight):
            part = weight[rows].float()
            best = self._stored(part.abs().amax(1, keepdim=True) / LARGEST)
            if self.scale_search:
                best = self._searched(part, best, importance)
            scales.append(best)
            codes[rows] = to_fp8(part, best)
        return PackedWeight(codes, torch.cat(scales), 8)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        info = torch.finfo(self.scale_dtype)
        smallest = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
        return scale.clamp(smallest, info.max / LARGEST).to(self.scale_dtype)

    def _searched(self, weight: torch.Tensor, reach: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
        best, least = reach, torch.full((len(weight), 1), torch.inf, device=weight.device)
        for share in SHARES.flip(0).tolist():
            scale = self._stored(reach.float() * share)
            error = ((to_fp8(weight, scale).float() * scale.float() - weight).square() * cost).sum(1, keepdim=True)
            wins = error < least
            best, least = torch.where(wins, scale, best), torch.where(wins, error, least)
        return best


def to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest codes, float8_e4m3fn [rows, columns]. weight: float32 [rows, columns]; scale: [rows, 1]."""
    return (weight / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
