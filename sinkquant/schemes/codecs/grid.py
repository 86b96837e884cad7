"""What a method has to know of the numbers that a weight may take: the codes, and the scales that can be stored.
Rounding to nearest takes no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from sinkquant.schemes.codecs.integer_scales import clamped_, searched_scales, storable
from sinkquant.schemes.codecs.packed import PackedWeight, group_scales, row_chunks


class Grid(Protocol):
    """Codes times a scale per group, which is held as it is stored."""

    @property
    def held(self) -> torch.dtype:
        """What codes are in memory: int8, or float8_e4m3fn."""

    @property
    def free_scales(self) -> bool:
        """Whether scales are so fine that those of a row are fitted together; coarse ones are one after the other."""

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Round to the nearest codes in place. codes: float32, any shape; scale: theirs, as stored, for grids whose
        numbers differ by group."""

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What codes are multiplied with, float32. scale: as stored, any shape."""

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest scales that can be stored. spread: float32, any shape; now: those that they take the place of,
        for what else is stored with a scale."""

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """The scales of weights, float32 [rows, columns], as stored [rows, groups]: those that reach the largest, or
        with `search` those with the least error. importance: [columns], what an error in a column costs."""

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
        """codes: as they are held, [rows, columns]; scale: as stored, [rows, groups]."""


class TunableGrid(Grid, Protocol):
    """One whose codes can move by steps: all groups have the same, in one order."""

    def places(self, codes: torch.Tensor) -> torch.Tensor:
        """Where numbers lie among the codes, float32: two codes that follow one another are 1 apart, and what lies
        between them is in proportion. codes: float32, any shape; they may be overwritten."""

    def at_(self, places: torch.Tensor) -> torch.Tensor:
        """The code nearest to a place, in place. places: float32, any shape."""


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of so many bits in groups of `size` columns, -1: one group per row; 16-bit scales in both signs."""

    held: ClassVar[torch.dtype] = torch.int8
    free_scales: ClassVar[bool] = True
    bits: int
    scale_dtype: torch.dtype
    size: int = -1

    def nearest_(self, codes: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Rounded and clamped."""
        return clamped_(codes, self.bits)

    def places(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes are 1 apart."""
        return codes

    def at_(self, places: torch.Tensor) -> torch.Tensor:
        """Rounded and clamped."""
        return clamped_(places, self.bits)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale itself."""
        return scale.float()

    def storable(self, spread: torch.Tensor, now: torch.Tensor | None = None) -> torch.Tensor:
        """In 16 bits, not zero."""
        return storable(spread, self.bits, self.scale_dtype)

    def scales(self, weight: torch.Tensor, importance: torch.Tensor | None, search: bool) -> torch.Tensor:
        """As `searched_scales` or `group_scales`."""
        if search:
            return searched_scales(weight, self.bits, self.size, self.scale_dtype, importance)
        return group_scales(weight, self.bits, self.size, self.scale_dtype)

    def weight(self, codes: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
        """Nothing stands beside the codes."""
        return PackedWeight(codes, scale, self.bits)


def grid_of(packed: PackedWeight) -> TunableGrid:
    """What the codes of a weight that can be tuned are of: its own grid where it knows one, integers otherwise."""
    own: TunableGrid | None = getattr(packed, "grid", None)
    return own or IntegerGrid(packed.bits, packed.scale.dtype)


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
