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
        bits: 1, 2, 3, 4 or 8.
        group: None for one range per channel over the block's G tokens; else one per token and `group` channels.
        clip: cut every range, and fit its scale, so that rounding errs least without shrinking; see `clipped`.

    Returns:
        codes uint8 [..., G, D]; scale float16 [..., 1, D] or [..., G, D / group]; zero alike, None if symmetric.
    """
    values, along = _grouped(x.float(), group)
    counted = counted if counted is None or group is None else counted[..., None]
    low, high = values, values
    if counted is not None:
        low, high = values.masked_fill(~counted, float("inf")), values.masked_fill(~counted, float("-inf"))
    low, high = low.amin(along, keepdim=True), high.amax(along, keepdim=True)
    if counted is not None:
        nothing = low > high
        low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
    if symmetric:
        high = torch.maximum(-low, high).clamp(min=0)
        low = -high
    levels = 2**bits - 1

    def rounded(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        scale, zero = _grid(low, high, levels, symmetric)
        return _nearest(values, scale.float(), start_of(scale.float(), zero, levels), levels), scale, zero

    if clip:
        low, high, scale, zero = clipped(values, counted, along, low, high, rounded, levels / 2)
        codes, _, _ = rounded(low, high)
    else:
        codes, scale, zero = rounded(low, high)
    if group is not None:
        codes, scale, zero = codes.flatten(-2), scale.squeeze(-1), None if zero is None else zero.squeeze(-1)
    return codes.to(torch.uint8), scale, zero


def _grid(low: torch.Tensor, high: torch.Tensor, levels: int,
          symmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float16 scale and zero of ranges."""
    if symmetric:
        return _half(2 * high / levels), None
    zero = low.clamp(-LARGEST, LARGEST).half()
    return _half((high - zero.float()) / levels), zero


def start_of(scale: torch.Tensor, zero: torch.Tensor | None, levels: int) -> torch.Tensor:
    """What code 0 stands for, of a float32 scale; zero: None for a symmetric grid."""
    return -0.5 * levels * scale if zero is None else zero.float()


def _grouped(values: torch.Tensor, group: int | None) -> tuple[torch.Tensor, int]:
    """Values so that a scale with one element along a dimension fits them, and that dimension."""
    return (values, -2) if group is None else (values.unflatten(-1, (-1, group)), -1)


def recoded(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int,
            group: int | None) -> torch.Tensor:
    """Codes of [..., G, D] on another grid, whose float32 scales and zeros are given."""
    levels, (values, _) = 2**bits - 1, _grouped(x.float(), group)
    step, start = scale, start_of(scale, zero, levels)
    if group is None:
        return _nearest(values, step, start, levels).to(torch.uint8)
    return _nearest(values, step[..., None], start[..., None], levels).flatten(-2).to(torch.uint8)


def _nearest(values: torch.Tensor, step: torch.Tensor, start: torch.Tensor, levels: int) -> torch.Tensor:
    return (values - start).div_(step).round_().clamp_(0, levels)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int | None,
               dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, computed in float32. See `quantize` for the shapes."""
    step, (values, _) = scale.float(), _grouped(codes.to(torch.float32, copy=True), group)
    start = start_of(step, zero, 2**bits - 1)
    if group is None:
        return values.mul_(step).add_(start).to(dtype)
    return values.mul_(step[..., None]).add_(start[..., None]).flatten(-2).to(dtype)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST).half()
