"""Uniform grids: keys per channel in groups along time, values per token in groups along the head (KIVI 2402.02750).

Scales and zeros are float16. The zero is rounded before the codes are computed, so that its rounding moves the grid
and adds no error of its own. A symmetric grid has no zero point: its levels lie at (code - (2**bits - 1) / 2) * scale.
"""

from __future__ import annotations

import torch

from sinkquant.cache.transforms.clip import clipped

SMALLEST_SCALE = 2.0**-24
LARGEST = 65504.0


def quantize(x: torch.Tensor, counted: torch.Tensor | None, bits: int, group: int | None, symmetric: bool,
             clip: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros of blocks.

    Args:
        x: [..., G, D].
        counted: bool [..., G, 1], the tokens whose values set the ranges; the others get an arbitrary code. None: all.
        bits: 2, 3, 4 or 8.
        group: None for one range per channel over the block's G tokens; else one per token and `group` channels.
        clip: cut every range, and fit its scale, so that rounding errs least without shrinking; see `clipped`.

    Returns:
        codes uint8 [..., G, D]; scale float16 [..., 1, D] or [..., G, D / group]; zero alike, None if symmetric.
    """
    values = x.float()
    low, high = values, values
    if counted is not None:
        low, high = values.masked_fill(~counted, float("inf")), values.masked_fill(~counted, float("-inf"))
    if group is None:
        low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    else:
        low, high = low.unflatten(-1, (-1, group)).amin(-1), high.unflatten(-1, (-1, group)).amax(-1)
    if counted is not None:
        nothing = low > high
        low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
    if symmetric:
        high = torch.maximum(-low, high).clamp(min=0)
        low = -high
    levels = 2**bits - 1
    if clip:
        return clipped(values, counted, group, low, high,
                       lambda low, high: _rounded(values, low, high, levels, group, symmetric), levels / 2)
    return _rounded(values, low, high, levels, group, symmetric)


def _rounded(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, group: int | None,
             symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros for ranges in the shape of the scales."""
    zero = None
    if symmetric:
        scale = _half(2 * high / levels)
        offset = -0.5 * levels * scale.float()
    else:
        zero = low.clamp(-LARGEST, LARGEST).half()
        offset = zero.float()
        scale = _half((high - offset) / levels)
    return _codes(values, scale.float(), offset, levels, group), scale, zero


def recoded(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int,
            group: int | None) -> torch.Tensor:
    """Codes of [..., G, D] on another grid, whose float32 scales and zeros are given."""
    levels = 2**bits - 1
    return _codes(x.float(), scale, -0.5 * levels * scale if zero is None else zero, levels, group)


def _codes(values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: int,
           group: int | None) -> torch.Tensor:
    step, start = _spread(scale, group), _spread(offset, group)
    return ((values - start) / step).round_().clamp_(0, levels).to(torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int | None,
               dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, computed in float32. See `quantize` for the shapes."""
    step = scale.float()
    offset = zero.float() if zero is not None else -0.5 * (2**bits - 1) * step
    values = codes.to(torch.float32, copy=True)
    if group is None:
        return values.mul_(step).add_(offset).to(dtype)
    grouped = values.unflatten(-1, (-1, group))
    return grouped.mul_(step[..., None]).add_(offset[..., None]).flatten(-2).to(dtype)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST).half()


def _spread(of_groups: torch.Tensor, group: int | None) -> torch.Tensor:
    return of_groups if group is None else of_groups.repeat_interleave(group, dim=-1)
