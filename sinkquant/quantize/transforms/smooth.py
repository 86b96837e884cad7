"""Scales of channels: SmoothQuant's, AWQ's, and one for sink columns alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.transforms.places import InputStatistics, Place
from sinkquant.quantize.transforms.search import Reader, best, best_rounded

LIMIT = 1e4
"""No channel is scaled by more, or by less than one over it."""
STEPS = 20
STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Of SmoothQuant's scale that are tried."""


@dataclass(frozen=True)
class SmoothQuant:
    """Take ranges from the inputs into the weights (Xiao et al. 2211.10438, equation 4): every channel is divided by
    max|x|^strength / max|w|^(1 - strength). Made for quantized activations."""

    strength: float = 0.5

    def scale(self, place: Place, seen: InputStatistics, weights: list[torch.Tensor]) -> torch.Tensor:
        """[channels]. weights: all that read the place, float32 [..., out, columns]."""
        inputs = place.channels(seen.largest, largest=True)
        reach = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in weights]).amax(0)
        ranges = place.channels(reach, largest=True)
        found = inputs**self.strength / ranges.clamp(min=1e-5) ** (1 - self.strength)
        # A channel that is always zero, or that nobody reads, is left as it is.
        return torch.where((inputs > 0) & (ranges > 0), found, 1.0).clamp(1 / LIMIT, LIMIT)


@dataclass(frozen=True)
class SearchedSmoothQuant:
    """SmoothQuant's scale with the strength, of `strengths`, that leaves the least error in what the packed readers
    give, inputs and weights rounded to nearest in their formats; or no scale, where none of them leaves less."""

    scale_search: bool = True
    strengths: tuple[float, ...] = STRENGTHS

    def scale(self, place: Place, seen: InputStatistics, weights: list[torch.Tensor],
              readers: list[Reader]) -> torch.Tensor:
        """[channels]. weights: of all that read the place, as `SmoothQuant.scale` has them."""
        scales = [SmoothQuant(strength).scale(place, seen, weights) for strength in self.strengths]
        scales.insert(0, torch.ones_like(scales[0]))
        columns = [place.columns(scale) for scale in scales]
        found = best_rounded(columns, readers, seen.tokens(), seen.largest, self.scale_search)
        return next(scale for scale, one in zip(scales, columns, strict=True) if one is found)


@dataclass(frozen=True)
class AWQ:
    """Divide every channel by a power of its mean |x| (Lin et al. 2306.00978, section 3.2): the power, of `steps` from
    0 to 1, that leaves the least weighted error in what the packed readers give, rounded to nearest."""

    scale_search: bool = True
    steps: int = STEPS

    def scale(self, place: Place, seen: InputStatistics, readers: list[Reader]) -> torch.Tensor:
        """[channels]."""
        sizes = place.channels(seen.mean, largest=False).clamp(min=1e-4)
        return _search(place, seen, readers, self.scale_search, [
            _middle(sizes ** (step / self.steps)) for step in range(self.steps)])


@dataclass(frozen=True)
class ScaleSinks:
    """Divide sink columns by a power of their size over the median column's, and leave all others alone: their weights
    grow over their group's rounding error at no cost in bytes. The power is searched as in AWQ."""

    columns: frozenset[int]
    scale_search: bool = True
    steps: int = STEPS

    def scale(self, place: Place, seen: InputStatistics, readers: list[Reader]) -> torch.Tensor:
        """[channels]."""
        sizes = seen.hessian.mean().diagonal().sqrt().float()
        chosen = torch.zeros_like(sizes)
        chosen[sorted(self.columns)] = 1
        mine = place.channels(chosen, largest=True) > 0
        over = place.channels(sizes / sizes.median().clamp(min=1e-30), largest=True).clamp(min=1)
        return _search(place, seen, readers, self.scale_search, [
            torch.where(mine, over ** (step / self.steps), torch.ones_like(over)).clamp(max=LIMIT)
            for step in range(self.steps + 1)])


def _search(place: Place, seen: InputStatistics, readers: list[Reader], scale_search: bool,
            candidates: list[torch.Tensor]) -> torch.Tensor:
    by_columns = [place.columns(candidate) for candidate in candidates]
    found = best(by_columns, readers, seen.hessian.mean(), scale_search)
    return next(one for one, columns in zip(candidates, by_columns, strict=True) if columns is found)


def _middle(scale: torch.Tensor) -> torch.Tensor:
    """The scale over the geometric mean of its ends."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / LIMIT, LIMIT)
