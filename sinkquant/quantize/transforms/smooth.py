"""Scales of channels, [channels] of a place: SmoothQuant's, AWQ's, and one for sink columns alone."""

from __future__ import annotations

from collections.abc import Set

import torch

from sinkquant.quantize.transforms.places import InputStatistics, Place
from sinkquant.quantize.transforms.search import Reader, best, best_rounded

LIMIT = 1e4
"""No channel is scaled by more, or by less than one over it."""
STEPS = 20
"""Equal steps of the powers from 0 to 1."""
STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Of SmoothQuant's scale that are tried."""


def smoothquant(place: Place, seen: InputStatistics, weights: list[torch.Tensor],
                strength: float = 0.5) -> torch.Tensor:
    """Take ranges from the inputs into the weights (Xiao et al. 2211.10438, equation 4): every channel is divided by
    max|x|^strength / max|w|^(1 - strength). Made for quantized activations.

    Args:
        weights: all that read the place, float32 [..., out, columns].
    """
    inputs = place.channels(seen.largest, largest=True)
    reach = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in weights]).amax(0)
    ranges = place.channels(reach, largest=True)
    found = inputs**strength / ranges.clamp(min=1e-5) ** (1 - strength)
    # A channel that is always zero, or that nobody reads, is left as it is.
    return torch.where((inputs > 0) & (ranges > 0), found, 1.0).clamp(1 / LIMIT, LIMIT)


def searched_smoothquant(place: Place, seen: InputStatistics, weights: list[torch.Tensor], readers: list[Reader],
                         scale_search: bool) -> torch.Tensor:
    """SmoothQuant's scale with the strength, of `STRENGTHS`, that leaves the least error in what the packed readers
    give, inputs and weights rounded to nearest in their formats; or no scale, where none of them leaves less.

    Args:
        weights: as `smoothquant` has them.
    """
    scales = [smoothquant(place, seen, weights, strength) for strength in STRENGTHS]
    scales.insert(0, torch.ones_like(scales[0]))
    columns = [place.columns(scale) for scale in scales]
    return scales[best_rounded(columns, readers, seen.tokens(), seen.largest, scale_search)]


def awq(place: Place, seen: InputStatistics, readers: list[Reader], scale_search: bool) -> torch.Tensor:
    """Divide every channel by a power of its mean |x| (Lin et al. 2306.00978, section 3.2): the power, of `STEPS` from
    0 to 0.95, that leaves the least weighted error in what the packed readers give, rounded to nearest."""
    sizes = place.channels(seen.mean, largest=False).clamp(min=1e-4)
    return _best_of([_middle(sizes ** (step / STEPS)) for step in range(STEPS)], place, seen, readers, scale_search)


def sink_scale(place: Place, seen: InputStatistics, readers: list[Reader], columns: Set[int],
               scale_search: bool) -> torch.Tensor:
    """Divide sink columns by a power of their size over the median column's, and leave all others alone: their weights
    grow over their group's rounding error at no cost in bytes. The power is searched as in AWQ."""
    sizes = seen.hessian.mean().diagonal().sqrt().float()
    chosen = torch.zeros_like(sizes)
    chosen[sorted(columns)] = 1
    mine = place.channels(chosen, largest=True) > 0
    over = place.channels(sizes / sizes.median().clamp(min=1e-30), largest=True).clamp(min=1)
    scales = [torch.where(mine, over ** (step / STEPS), torch.ones_like(over)).clamp(max=LIMIT)
              for step in range(STEPS + 1)]
    return _best_of(scales, place, seen, readers, scale_search)


def _best_of(scales: list[torch.Tensor], place: Place, seen: InputStatistics, readers: list[Reader],
             scale_search: bool) -> torch.Tensor:
    columns = [place.columns(scale) for scale in scales]
    return scales[best(columns, readers, seen.hessian.mean(), scale_search)]


def _middle(scale: torch.Tensor) -> torch.Tensor:
    """The scale over the geometric mean of its ends."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / LIMIT, LIMIT)
