"""A grid that is no line: codes are the numbers of a table, times one 16-bit scale per group, in both signs.

ggml's IQ4_NL has 16 numbers that lie closer together around zero, where most weights of a group are. None of them is
zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkquant.schemes.codecs.integer_scales import least_error, storable
from sinkquant.schemes.codecs.packed import PackedWeight

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers of IQ4_NL, by their codes in the file."""
NUMBER_BITS = 8
"""Of a number of the table: no scale is so large that one times it overflows."""
REACH = 128
"""Beyond all numbers of a table."""


@dataclass(frozen=True)
class TableGrid:
    """Whole numbers between -128 and 127, ascending, in groups of `size` columns, -1: one group per row."""

    held: ClassVar[torch.dtype] = torch.int8
    free_scales: ClassVar[bool] = True
    numbers: tuple[int, ...]
    size: int

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Round to the nearest number of the table in place."""
        nearest = _half_steps(self.numbers, codes.device)
        place = codes.mul_(2).add_(2 * REACH).clamp_(0, len(nearest) - 1).to(torch.int32)
        return codes.copy_(nearest.index_select(0, place.flatten()).view(codes.shape))

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale itself."""
        return scale.float()

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """In float16, not zero."""
        return storable(spread, NUMBER_BITS, torch.float16)

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """Of every group, float16 [rows, groups]: those with which the largest |weight| gets the largest |number|; with
        `search` those with the least weighted error, as integers have them. weight: float [rows, columns]."""
        grouped = weight.float().unflatten(1, (-1, weight.shape[1] if self.size == -1 else self.size))
        top = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0]
        reach = self.storable(top / max(self.numbers, key=abs))
        return least_error(weight, importance, reach, self.nearest_, self.storable) if search else reach

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
        """codes: numbers of the table, int8 [rows, columns]; scale: float16 [rows, groups]."""
        return PackedWeight(codes, scale, (len(self.numbers) - 1).bit_length())


@functools.lru_cache(maxsize=4)  # GPTQ asks for every column
def _half_steps(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The nearest number for every half step from -REACH to REACH, float32: a middle between two whole numbers is a
    multiple of a half. A look-up takes a tenth of the time of a search among the middles."""
    found = torch.tensor(numbers, dtype=torch.float32)
    steps = torch.arange(-2 * REACH, 2 * REACH) / 2 + 0.25
    return found[torch.bucketize(steps, (found[1:] + found[:-1]) / 2)].to(device)
