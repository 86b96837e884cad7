"""Asymmetric integers: codes of 0 to 2^bits - 1 less a zero point of the group, times the group's scale.

A code is held less its zero point, so that it is a number times the scale as anywhere else; what differs by group
is which numbers there are. A scale is held with its zero point in one int32 word: float16 in the low half, the zero
point in the high one. Scales have 7 significant bits (6 at 5 bits in a GGUF file), so that a scale times a zero point,
which is what a GGUF block stores as its least value, is exact in float16, which has 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkquant.schemes.codecs.integer_scales import group_costs
from sinkquant.schemes.codecs.packed import PackedWeight

SHARES = (0.55, 0.65, 0.75, 0.82, 0.88, 0.94, 1.0, 1.06)
"""The grid of the search, as shares of the scale that reaches from the least to the largest weight."""
FITS = 2
"""Times that the best scale is fitted to its codes and the codes are taken anew."""
SMALLEST = 2.0 ** -24
LARGEST = 2.0 ** 10
"""Of scales: float16's least number, and one that its largest codes do not take over float16's range."""


@dataclass(frozen=True)
class ZeroGrid:
    """Codes of so many bits in groups of `size` columns, -1: one group per row. `least`: the smallest zero point that
    the files can hold. `digits`: significant bits of a scale."""

    held: ClassVar[torch.dtype] = torch.int8
    free_scales: ClassVar[bool] = True
    bits: int
    size: int
    least: int = 0
    digits: int = 7

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** self.bits - 1)

    def word(self, spread: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """int32 words of positive scales, float32, and whole zero points."""
        mantissa, exponent = torch.frexp(spread.float().clamp(SMALLEST, LARGEST))
        steps = 2.0 ** self.digits
        short = torch.ldexp((mantissa * steps).round() / steps, exponent).to(torch.float16)
        return short.view(torch.int16).to(torch.int32) | zero.to(torch.int32) << 16

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What codes less their zero point are multiplied with, float32. scale: words, any shape."""
        return (scale & 0x7FFF).to(torch.int16).view(torch.float16).float()

    def zero(self, scale: torch.Tensor) -> torch.Tensor:
        """The zero points, int32. scale: words, any shape."""
        return scale >> 16

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Round in place to whole numbers that the group of every code has. scale: words, of a shape that goes with
        the codes'."""
        assert scale is not None
        zero = self.zero(scale).float()
        torch.minimum(codes.round_(), self.top - zero, out=codes)
        return torch.maximum(codes, -zero, out=codes)

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest scales with the zero points of `now`, and `now` where a scale is not positive."""
        assert now is not None
        return torch.where(spread > 0, self.word(spread, self.zero(now)), now)

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """Words of every group, int32 [rows, groups]: from the least to the largest weight, zero among them; with
        `search` those with the least sum of importance * (weight - rounded)^2 among smaller ranges and zero points one
        to either side, the scale fitted to its codes by least squares.

        Args:
            weight: float [rows, columns]. importance: [columns], what an error in that column costs; None: all alike.
        """
        size = weight.shape[1] if self.size == -1 else self.size
        grouped = weight.float().unflatten(1, (-1, size))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        span = (high - low).clamp(min=SMALLEST)
        center = (-low / span * self.top).round().clamp(self.least, self.top)
        best = self.word(span / self.top, center)
        if not search:
            return best
        cost = group_costs(weight, importance, size)
        codes = torch.empty_like(grouped)
        least = self._error(grouped, best, cost, codes)
        for share in SHARES:
            for shift in (0, -1, 1):
                words = self.word(span * (share / self.top), (center + shift).clamp(self.least, self.top))
                best, least = self._better(grouped, words, cost, codes, best, least)
        for _ in range(FITS):
            self._error(grouped, best, cost, codes)
            fitted = (cost * codes * grouped).sum(-1) / (cost * codes.square()).sum(-1).clamp(min=1e-30)
            best, least = self._better(grouped, self.storable(fitted, best), cost, codes, best, least)
        return best

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> ZeroWeight:
        """codes: int8 [rows, columns], less their zero points; scale: words, [rows, groups]."""
        return ZeroWeight(codes, scale, self.bits)

    def _better(self, grouped: torch.Tensor, words: torch.Tensor, cost: torch.Tensor, codes: torch.Tensor,
                best: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error = self._error(grouped, words, cost, codes)
        return torch.where(error < least, words, best), torch.minimum(error, least)

    def _error(self, grouped: torch.Tensor, words: torch.Tensor, cost: torch.Tensor,
               codes: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of every group; its codes go into `codes`."""
        spread = self.spread(words)[..., None]
        self.nearest_(torch.div(grouped, spread, out=codes), words[..., None])
        return ((codes * spread - grouped).square_() * cost).sum(-1)


@dataclass(frozen=True)
class ZeroWeight(PackedWeight):
    """codes: int8 [rows, columns], less their zero points; scale: words, int32 [rows, groups]."""

    @property
    def grid(self) -> ZeroGrid:
        """What its codes are of."""
        return ZeroGrid(self.bits, self.codes.shape[1] // self.scale.shape[1])

    def spread(self) -> torch.Tensor:
        """What codes are multiplied with, float32 [rows, groups]."""
        return self.grid.spread(self.scale)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes from 0 on, uint8 [rows, columns], scales, float16 [rows, groups], and zero points, int32 alike."""
        zero = self.grid.zero(self.scale)
        spread = zero.repeat_interleave(self.codes.shape[1] // zero.shape[1], 1)
        return (self.codes.to(torch.int32) + spread).to(torch.uint8), self.spread().to(torch.float16), zero
