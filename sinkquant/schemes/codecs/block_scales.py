"""Grids of floating-point numbers in blocks: the numbers, the 8-bit scales, and the scale that leaves the least error.

A code of E2M1 is held as twice its number, an integer: 0, 1, 2, 3, 4, 6, 8, 12 in both signs. A scale is held as the
byte that stores it: E4M3 and E8M0 without a sign are in the order of their bytes: the next larger scale is one more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from sinkquant.models.inputs import nearest_e2m1_
from sinkquant.schemes.codecs.integer_scales import group_costs
from sinkquant.schemes.codecs.packed import PackedWeight

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the numbers of E2M1, by their three bits."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class BlockGrid:
    """One kind of codes with one kind of scale.

    Attributes:
        bits: of a code: 4 is E2M1, 8 is E4M3. size: columns in a block.
        whole: the scale of the whole tensor that an E4M3 scale is divided by, float32 [1]; None: scales are E8M0.
    """

    free_scales: ClassVar[bool] = False  # eight bits are coarse
    bits: int
    size: int
    whole: torch.Tensor | None = None

    @property
    def held(self) -> torch.dtype:
        """What codes are in memory."""
        return torch.int8 if self.bits == 4 else torch.float8_e4m3fn

    @property
    def top(self) -> float:
        """The largest code."""
        return float(E2M1[-1]) if self.bits == 4 else FP8_MAX

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> BlockWeight:
        """codes: int8 or float8_e4m3fn [rows, columns]; scale: bytes, [rows, blocks]."""
        return BlockWeight(codes, scale, self.bits, whole=self.whole)

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Round to the nearest codes in place, halves to the even one, and what is too large to the largest.

        codes: float32, any shape.
        """
        if self.bits == 8:
            return codes.copy_(codes.clamp_(-self.top, self.top).to(torch.float8_e4m3fn))
        return nearest_e2m1_(codes)

    def places(self, codes: torch.Tensor) -> torch.Tensor:
        """E2M1 alone: 0, 1, 2, 3, 4, 6, 8, 12 are in the places 0 to 7, and their negatives likewise."""
        size = codes.abs()
        low, middle, high = size.clamp(max=4), size.clamp(4, 8), size.clamp(min=8)
        return (low + (middle - 4) / 2 + (high - 8) / 4).copysign_(codes)

    def at_(self, places: torch.Tensor) -> torch.Tensor:
        """E2M1 alone."""
        size = places.round_().abs().clamp_(max=len(E2M1) - 1)
        low, middle, high = size.clamp(max=4), size.clamp(4, 6), size.clamp(min=6)
        return places.copy_((low + (middle - 4) * 2 + (high - 6) * 4).copysign_(places))

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What codes are multiplied with, float32. scale: bytes, any shape."""
        if self.whole is None:
            value = (scale.int() << 23).view(torch.float32)
        else:
            value = scale.view(torch.float8_e4m3fn).float() / self.whole.to(scale.device)
        return value * 0.5 if self.bits == 4 else value

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """The bytes of the nearest scales. spread: positive float32, any shape."""
        value = spread * 2 if self.bits == 4 else spread
        if self.whole is None:
            return self._exponents(value, 0.75)
        scaled = (value * self.whole.to(value.device)).clamp(max=FP8_MAX)
        return self._inside(scaled.to(torch.float8_e4m3fn).view(torch.uint8).int())

    def reach(self, largest: torch.Tensor) -> torch.Tensor:
        """The bytes of the scales that compressed-tensors takes: under E4M3 the largest weight of a block gets the
        largest code; under E8M0 its exponent is that of the largest code, one more where the mantissa is over 1.75.

        largest: float32, the largest |weight| of every block.
        """
        if self.whole is not None:
            return self.storable(largest / self.top)
        octaves = 2 ** (2 if self.bits == 4 else 8)  # the exponent of the largest code
        return self._exponents(largest / octaves, 0.875)

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """The scale of every block, bytes [rows, blocks].

        With `search` it is the one that leaves the least sum of importance * (weight - rounded)^2 among those near the
        one that reaches the largest weight: of E4M3 from a quarter less to half as much again, where the largest weight
        gets the code 4 instead of 6 ("four over six", arXiv 2512.02010), of E8M0 the next ones in both directions.

        Args:
            weight: float32 [rows, columns]. importance: [columns], what an error in that column costs; None: all alike.
        """
        grouped = weight.unflatten(1, (-1, self.size))
        reach = self.reach(grouped.abs().amax(-1))
        if not search:
            return reach
        cost = group_costs(weight, importance, self.size)
        best, least = reach, torch.full(reach.shape, torch.inf, device=weight.device)
        codes = torch.empty_like(grouped)
        for step in (0, *range(-3, 0), *range(1, 7)) if self.whole is not None else (0, -1, 1):
            scale = self._inside(reach.int() + step)
            spread = self.spread(scale)[..., None]
            self.nearest_(torch.div(grouped, spread, out=codes))
            error = codes.mul_(spread).sub_(grouped).square_().mul_(cost).sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def _exponents(self, value: torch.Tensor, up: float) -> torch.Tensor:
        """The bytes of powers of two: the next one below, or above where the mantissa, 0.5 to 1, is `up` or more."""
        mantissa, exponent = torch.frexp(value)
        return self._inside(exponent + 126 + (mantissa >= up).int())

    def _inside(self, scale: torch.Tensor) -> torch.Tensor:
        """Bytes whose scale is not zero, and with which no code overflows or falls under the smallest normal number."""
        low, high = (1, 126) if self.whole is not None else (4, 244)
        return scale.clamp(low, high).to(torch.uint8)


@dataclass(frozen=True)
class BlockWeight(PackedWeight):
    """codes: int8 [rows, columns], twice the numbers of E2M1, or float8_e4m3fn; scale: bytes, uint8 [rows, blocks].
    whole: the scale of the whole tensor, float32 [1], or None."""

    whole: torch.Tensor | None = None

    @property
    def grid(self) -> BlockGrid:
        """What its codes are of."""
        return BlockGrid(self.bits, self.codes.shape[1] // self.scale.shape[1], self.whole)

    def spread(self) -> torch.Tensor:
        """What codes are multiplied with, float32 [rows, blocks]."""
        return self.grid.spread(self.scale)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(super().to(device), whole=None if self.whole is None else self.whole.to(device))
