"""The scales of groups: the whole range, or a search for the scale that leaves the least weighted rounding error."""

from __future__ import annotations

import torch

from sinkquant.schemes.codecs.packed import group_scales

SMALLEST, LARGEST, STEPS = 0.4, 1.1, 29
"""The grid, as shares of the scale that reaches the largest |weight|: at 2 bits the best one clips more than half."""


def searched_scales(weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype,
                    importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales with the least sum of importance * (weight - rounded)^2 in every group.

    A grid of clipped ranges is tried in both signs: codes reach one further below zero than above, and a negative
    scale turns that side to where the larger weights are, at no cost in bytes. The best of the grid is then fitted to
    its codes by least squares, and the fit kept where it is better.

    Args:
        weight: float [rows, columns]; group_size divides columns, or is -1 for one group per row.
        importance: [columns], not negative: the mean square of every input column, or what else an error in that
            column costs. None: all alike.

    Returns:
        [rows, groups] in `dtype`, never zero.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    grouped = weight.float().unflatten(1, (-1, size))
    cost = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    cost = (cost / cost.mean().clamp(min=1e-30)).reshape(1, -1, size)
    # A group that nothing reads is still to be rounded sensibly.
    cost = torch.where(cost.sum(-1, keepdim=True) > 0, cost, torch.ones_like(cost))
    reach = group_scales(weight, bits, group_size, dtype)
    best, least = reach, _error(grouped, reach, bits, cost)[0]
    for share in torch.linspace(SMALLEST, LARGEST, STEPS).tolist():
        for sign in (share, -share):
            best, least, _ = _better(grouped, storable(reach.float() * sign, bits, dtype), bits, cost, best, least)
    codes = _error(grouped, best, bits, cost)[1]
    fitted = (cost * grouped * codes).sum(-1) / (cost * codes.square()).sum(-1).clamp(min=1e-30)
    return _better(grouped, storable(fitted, bits, dtype), bits, cost, best, least)[0]


def storable(scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """A scale as it is stored: 16 bits, not zero, and no code times it overflows."""
    info = torch.finfo(dtype)
    smallest = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    size = scale.abs().clamp(smallest, info.max / 2 ** (bits - 1))
    return torch.where(scale < 0, -size, size).to(dtype)


def _error(grouped: torch.Tensor, scale: torch.Tensor, bits: int,
           cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared error of every group [rows, groups], and the codes as floats [rows, groups, size]."""
    spread = scale.float()[..., None]
    codes = torch.clamp(torch.round(grouped / spread), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((codes * spread - grouped).square() * cost).sum(-1), codes


def _better(grouped: torch.Tensor, scale: torch.Tensor, bits: int, cost: torch.Tensor, best: torch.Tensor,
            least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    error, codes = _error(grouped, scale, bits, cost)
    wins = error < least
    return torch.where(wins, scale, best), torch.where(wins, error, least), codes
