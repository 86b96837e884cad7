"""Ranges cut to where rounding errs least, and scales fitted so that it does not shrink what it rounds.

Attention adds up many rounded numbers, so that errors without a direction cancel and a shrunk spread does not: the
range with the least squared error, which cuts tails off, does more harm than the whole range does. So the scale is the
one for which rounded numbers covary with the true ones as these do with themselves (what TurboQuant 2504.19874 asks of
inner products), and the cut is the one with the least squared error under that. All numbers of a group of keys meet the
same channel of the query, and all of a group of values the same attention weight, so that to first order this is the
error of attention's output. Sinks are no part of a group: they neither widen a range nor are cut by it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

RATIOS = (1.0, 0.92, 0.84)
"""Of the whole range. Four levels for 32 to 128 normal numbers err least at 0.8 to 0.6 of it, but what is cut off then
are the numbers of the very tokens that attention looks at."""

HALF = torch.finfo(torch.float16)


def clipped(values: torch.Tensor, counted: torch.Tensor | None, along: int, low: torch.Tensor, high: torch.Tensor,
            rounded: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
            middle_code: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The range of every group that errs least, and its fitted grid.

    The error of a group is found from moments of its numbers and codes, so that no range makes its own states.

    Args:
        values: float32, groups lying along the dimension `along`.
        counted: bool, broadcasts to values, which of them count; None for all.
        low, high: ends of the whole ranges, one element along that dimension.
        rounded: ends -> codes in float32, scale, zero.
        middle_code: what a grid without zeros takes off its codes.

    Returns:
        low, high, float16 scale and zero of every group; no zero where `rounded` gives none.
    """
    def alone(x: torch.Tensor) -> torch.Tensor:
        return x if counted is None else x.masked_fill(~counted, 0.0)

    def total(x: torch.Tensor) -> torch.Tensor:
        return x.sum(along, keepdim=True)

    count = (values.new_full((), values.shape[along]) if counted is None else
             counted.expand(values.shape).sum(along, keepdim=True).clamp(min=1))
    middle, half = (low + high) / 2, (high - low) / 2
    mean: torch.Tensor | None = None
    away, own = values, low
    best: list[torch.Tensor] = []
    for ratio in RATIOS:
        ends = middle - ratio * half, middle + ratio * half
        codes, scale, zero = rounded(*ends)
        if zero is None:
            codes = codes.sub_(middle_code)
        codes = alone(codes)
        if not best:
            mean = None if zero is None else total(alone(values)) / count
            away = alone(values if mean is None else values - mean)
            own = total(away * away)
        shared, squares = total(away * codes), total(codes * codes)
        if mean is None:
            scale = _fitted(own, shared, scale)
            error = scale.float() * (scale.float() * squares - 2 * shared) + own
            found = [error, *ends, scale]
        else:
            code = total(codes) / count
            scale = _fitted(own, shared, scale)
            zero = (mean - scale.float() * code).clamp(-HALF.max, HALF.max).half()
            missed = zero.float() + scale.float() * code - mean
            error = (scale.float() * (scale.float() * (squares - count * code.square()) - 2 * shared) + own
                     + count * missed.square())
            found = [error, *ends, scale, zero]
        better = None if not best else error < best[0]
        best = found if better is None else [torch.where(better, new, old)
                                             for new, old in zip(found, best, strict=True)]
    _, low, high, scale, *zeros = best
    return low, high, scale, zeros[0] if zeros else None


def _fitted(own: torch.Tensor, shared: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float16 scales; as they were where all of a group has one code."""
    fitted = (own / shared).clamp(HALF.tiny, HALF.max).half()
    return torch.where(shared > 0, fitted, scale)
