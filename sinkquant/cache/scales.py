"""Scales and zeros of a packed block in 8 bits instead of 16: codes of a second grid, whose ends stand beside them.

A group of 64 numbers in 2 bits takes 2.5 bits a number with its scale and its zero in float16, and 2.25 with these
(double quantization, QLoRA 2305.14314, section 3). All groups of one head in one block share the second grid, so that
a block is still quantized once, however its tokens arrive. Codes are found anew for the rounded scale and zero: what
their rounding moves is the grid, by a part of a step.
"""

from __future__ import annotations

import torch

STEPS, SIDE = 255, 127
"""Codes of a scale above 0, and of a zero on either side of it."""


def narrowed(scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The second grid.

    Args:
        scale, zero: float16 [..., blocks, a, b] as `grid.quantize` gives them.

    Returns:
        scale uint8 and zero int8 in the same shapes, and ends float16 [..., blocks, 1, 2]: the largest scale and the
        largest size of a zero; [..., blocks, 1, 1] where there are no zeros.
    """
    top = scale.amax((-2, -1), keepdim=True)
    codes = (scale.float() / top.float() * STEPS).round().clamp(1, STEPS).to(torch.uint8)
    if zero is None:
        return codes, None, top
    size = zero.abs().amax((-2, -1), keepdim=True)
    # Where every zero is 0, any end does.
    zeros = (zero.float() / size.float().clamp(min=torch.finfo(torch.float16).tiny) * SIDE).round().to(torch.int8)
    return codes, zeros, torch.cat([top, size], dim=-1)


def widened(scale: torch.Tensor, zero: torch.Tensor | None,
            ends: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero in float32, of what `narrowed` gave, or of float16 ones where `ends` is None."""
    return wide_scale(scale, ends), None if zero is None else wide_zero(zero, ends)


def wide_scale(scale: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """The scale of `widened` alone."""
    return scale.float() if ends is None else scale.float() * (ends[..., :1].float() / STEPS)


def wide_zero(zero: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """The zero of `widened` alone."""
    return zero.float() if ends is None else zero.float() * (ends[..., 1:].float() / SIDE)
