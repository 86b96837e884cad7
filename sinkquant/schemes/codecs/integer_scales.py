"""The scales of groups: the whole range, or a search for the scale that leaves the least weighted rounding error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sinkquant.schemes.codecs.packed import group_scales, smallest

SMALLEST, LARGEST, STEPS = 0.4, 1.1, 15
"""The grid, as shares of the scale that reaches the largest |weight|: at 2 bits the best one clips more than half."""
FITS = 2
"""Times that the best scale is fitted to its codes and the codes are taken anew."""


@torch.no_grad()
def searched_scales(weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype,
                    importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales with the least sum of importance * (weight - rounded)^2 in every group.

    The codes of a grid of clipped ranges are tried in both signs: codes reach one further below zero than above, and a
    negative scale turns that side to where the larger weights are, at no cost in bytes. Codes count with the scale that
    fits them best by least squares, s = sum c w q / sum c q^2, which leaves sum c w^2 - (sum c w q)^2 / sum c q^2. The
    best of the grid is then stored and fitted again, and kept where it is better.

    Args:
        weight: float [rows, columns]; group_size divides columns, or is -1 for one group per row.
        importance: [columns], not negative: the mean square of every input column, or what else an error in that
            column costs. None: all alike.

    Returns:
        [rows, groups] in `dtype`, never zero.
    """
    reach = group_scales(weight, bits, group_size, dtype)
    return least_error(weight, importance, reach, lambda codes: clamped_(codes, bits),
                       lambda scale: storable(scale, bits, dtype))


def least_error(weight: torch.Tensor, importance: torch.Tensor | None, reach: torch.Tensor,
                nearest_: Callable[[torch.Tensor], torch.Tensor],
                stored: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The search of `searched_scales` for any codes.

    Args:
        reach: scales that reach the largest |weight|, as stored, [rows, groups]. nearest_: rounds to codes in place.
            stored: the nearest scales that can be stored.
    """
    columns, size = weight.shape[1], weight.shape[1] // reach.shape[1]
    grouped = weight.float().unflatten(1, (-1, size))
    cost = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    cost = (cost / cost.mean().clamp(min=1e-30)).reshape(1, -1, size)
    # A group that nothing reads is still to be rounded sensibly.
    cost = torch.where(cost.sum(-1, keepdim=True) > 0, cost, torch.ones_like(cost))
    pulls = grouped * cost
    best, most = reach.float(), torch.zeros(reach.shape, device=weight.device)
    codes, work = torch.empty_like(grouped), torch.empty_like(grouped)
    for share in torch.linspace(SMALLEST, LARGEST, STEPS).tolist():
        for sign in (share, -share):
            nearest_(torch.div(grouped, (reach.float() * sign)[..., None], out=codes))
            fitted, saved = _fit(codes, pulls, cost, work)
            best, most = torch.where(saved > most, fitted, best), torch.maximum(saved, most)
    found, least = reach, _error(grouped, reach, nearest_, cost, codes)
    for _ in range(FITS):
        scale = stored(best)
        error = _error(grouped, scale, nearest_, cost, codes)
        found, least = torch.where(error < least, scale, found), torch.minimum(error, least)
        best = _fit(codes, pulls, cost, work)[0]
    return found


def group_costs(weight: torch.Tensor, importance: torch.Tensor | None, size: int) -> torch.Tensor:
    """What an error in a column costs over the mean of its group, float32 [groups, size]. weight: [rows, columns];
    importance: [columns], None: all alike."""
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    cost = cost.reshape(-1, size)
    cost = cost / cost.mean(-1, keepdim=True).clamp(min=1e-30)
    # A group that nothing reads is still to be rounded sensibly.
    return torch.where(cost.sum(-1, keepdim=True) > 0, cost, torch.ones_like(cost))


def storable(scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """A scale as it is stored: 16 bits, not zero, and no code times it overflows."""
    size = scale.abs().clamp(smallest(dtype), torch.finfo(dtype).max / 2 ** (bits - 1))
    return torch.where(scale < 0, -size, size).to(dtype)


def clamped_(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to whole numbers of so many bits in place."""
    return codes.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _fit(codes: torch.Tensor, pulls: torch.Tensor, cost: torch.Tensor,
         work: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales that fit codes best, and what they take off the weighted square of a group, both [rows, groups].
    pulls: cost * weight."""
    along = torch.mul(codes, pulls, out=work).sum(-1)
    square = torch.mul(codes, codes, out=work).mul_(cost).sum(-1).clamp_(min=1e-30)
    scale = along / square
    return scale, scale * along


def _error(grouped: torch.Tensor, scale: torch.Tensor, nearest_: Callable[[torch.Tensor], torch.Tensor],
           cost: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every group, [rows, groups]; its codes go into `codes`."""
    spread = scale.float()
    nearest_(torch.div(grouped, spread[..., None], out=codes))
    return ((codes * spread[..., None] - grouped).square_() * cost).sum(-1)
