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

Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and zeros as `sinkquant.cache.grid.quantize` gives them."""


def clipped(values: torch.Tensor, counted: torch.Tensor | None, group: int | None, low: torch.Tensor,
            high: torch.Tensor, rounded: Callable[[torch.Tensor, torch.Tensor], Grid], middle_code: float) -> Grid:
    """The grid of every group that errs least.

    Args:
        values: float32 [..., G, D]. counted, group: see `sinkquant.cache.grid.quantize`.
        low, high: ends of the whole ranges, in the shape of the scales.
        rounded: ends -> grid.
        middle_code: what a grid without zeros takes off its codes.
    """
    def per_group(x: torch.Tensor) -> torch.Tensor:
        x = x if counted is None else x.masked_fill(~counted, 0.0)
        return x.sum(-2, keepdim=True) if group is None else x.unflatten(-1, (-1, group)).sum(-1)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x if group is None else x.repeat_interleave(group, dim=-1)

    count = per_group(torch.ones_like(values)).clamp(min=1)
    mean = per_group(values) / count
    middle, half = (low + high) / 2, (high - low) / 2
    best: Grid | None = None
    least = low
    for ratio in RATIOS:
        codes, scale, zero = rounded(middle - ratio * half, middle + ratio * half)
        numbers = codes.float()
        if zero is None:
            numbers -= middle_code
            scale = _fitted(per_group(values * values), per_group(values * numbers), scale)
            found = numbers * spread(scale.float())
        else:
            code = per_group(numbers) / count
            away = values - spread(mean)
            scale = _fitted(per_group(away * away), per_group(away * (numbers - spread(code))), scale)
            zero = (mean - scale.float() * code).clamp(-HALF.max, HALF.max).half()
            found = numbers * spread(scale.float()) + spread(zero.float())
        error = per_group((found - values).square())
        if best is None:
            best, least = (codes, scale, zero), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(spread(better), codes, best[0]), torch.where(better, scale, best[1]),
                None if zero is None or best[2] is None else torch.where(better, zero, best[2]))
    assert best is not None
    return best


HALF = torch.finfo(torch.float16)


def _fitted(own: torch.Tensor, shared: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float16 scales; as they were where all of a group has one code."""
    fitted = (own / shared).clamp(HALF.tiny, HALF.max).half()
    return torch.where(shared > 0, fitted, scale)
