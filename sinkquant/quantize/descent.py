"""Coordinate descent on the loss that GPTQ leaves (QuantEase, Behdin et al. 2309.01885), with scales fitted in between.

GPTQ never comes back to a column, nor to a scale whose codes were changed by what came later. Here all other weights
held fixed, the best code of a column is known in closed form, and so are the best scales of a row for its codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes.codecs.grid import Grid, IntegerGrid
from sinkquant.schemes.codecs.packed import PackedWeight

BLOCK = 64
CHUNK = 1 << 24
"""Weights, or pairs of groups whose scales are fitted together, that are worked on at a time."""


@torch.no_grad()
def descend(packed: PackedWeight, weight: torch.Tensor, hessian: torch.Tensor, passes: int,
            pull: torch.Tensor | None = None, kept: torch.Tensor | None = None,
            grid: Grid | None = None) -> PackedWeight:
    """Lower trace((Q - W) H (Q - W)^T) - 2 trace((Q - W) P^T), where Q is what the codes and scales give.

    Every pass fits the scales of a row to its codes and then visits every column once, from left to right. No row ends
    with a larger loss than it came with.

    Args:
        weight: float [rows, columns]. hessian: [columns, columns], positive definite, so with its damping.
        pull: P, [rows, columns]: what asymmetric calibration asks for beside W; None: nothing.
        kept: bool [rows, columns]; where it is False the code is 0 and stays 0. None: all codes may change.
        grid: the numbers that a weight may take; None: integers.
    """
    metric, grid = hessian.float(), grid or IntegerGrid(packed.bits, packed.scale.dtype)
    codes, scale = torch.empty_like(packed.codes), torch.empty_like(packed.scale)
    pairs = packed.scale.shape[1] ** 2 if grid.free_scales else 0
    step = max(1, CHUNK // max(weight.shape[1], pairs))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        wanted = metric @ weight[rows].T.float()
        if pull is not None:
            wanted += pull[rows].T.float()
        free = None if kept is None else kept[rows].T.float()
        codes[rows], scale[rows] = _descend(packed.codes[rows], packed.scale[rows], grid, metric, wanted, passes, free)
    return grid.weight(codes, scale)


def _descend(codes: torch.Tensor, scale: torch.Tensor, grid: Grid, metric: torch.Tensor, wanted: torch.Tensor,
             passes: int, free: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """wanted: B, [columns, rows]. free: 1 for codes that may change, 0 for others, [columns, rows]."""
    best = now = _State.of(codes.T.float().contiguous(), scale.T.contiguous(), grid, metric, wanted)
    fitted = _fitted if grid.free_scales else _fitted_in_turn
    for _ in range(passes):
        now = _visited(fitted(now, grid, metric, wanted), grid, metric, wanted, free)
        best = now.where_better(best)
    return best.codes.T.to(torch.int8), best.scale.T


@dataclass(frozen=True)
class _State:
    """Codes [columns, rows] as floats and scales [groups, rows], and what takes a product as large as the Hessian to
    know: `slope` is H Q^T - B [columns, rows], `loss` Q H Q^T - 2 Q B^T of every row, float64 [rows], the loss less
    what no code changes; B is `wanted`. A column of the weight is a row of memory."""

    codes: torch.Tensor
    scale: torch.Tensor
    slope: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def of(cls, codes: torch.Tensor, scale: torch.Tensor, grid: Grid, metric: torch.Tensor,
           wanted: torch.Tensor) -> _State:
        slope = torch.addmm(wanted, metric, codes * _spread(scale, grid, len(codes)), beta=-1)
        return cls.at(codes, scale, grid, slope, wanted)

    @classmethod
    def at(cls, codes: torch.Tensor, scale: torch.Tensor, grid: Grid, slope: torch.Tensor,
           wanted: torch.Tensor) -> _State:
        """Where the slope is known."""
        new = codes * _spread(scale, grid, len(codes))
        return cls(codes, scale, slope, (new * (slope - wanted)).sum(0, dtype=torch.float64))

    def where_better(self, other: _State) -> _State:
        """Of every row the state with less loss; the other's where they are equal."""
        better = self.loss < other.loss
        return _State(*(torch.where(better, mine, its) for mine, its in (
            (self.codes, other.codes), (self.scale, other.scale), (self.slope, other.slope), (self.loss, other.loss))))


def _spread(scale: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    return grid.spread(scale).repeat_interleave(columns // len(scale), dim=0)


def _fitted_in_turn(now: _State, grid: Grid, metric: torch.Tensor, wanted: torch.Tensor) -> _State:
    """With every group's scale in turn at the one that can be stored with the least loss, all other weights held fixed.
    Coarse scales would lose by rounding what fitting them together gains."""
    size = len(now.codes) // len(now.scale)
    scale, slope, spread = now.scale.clone(), now.slope.clone(), grid.spread(now.scale)
    for group in range(len(scale)):
        columns = slice(group * size, (group + 1) * size)
        part = now.codes[columns]
        curve = ((metric[columns, columns] @ part) * part).sum(0)
        best = spread[group] - (slope[columns] * part).sum(0) / curve.clamp(min=1e-30)
        # A group whose codes are all zero fits any scale. The loss is a parabola: the nearest scale is the best one.
        scale[group] = torch.where((curve > 0) & (best > 0), grid.storable(best.clamp(min=1e-30), scale[group]),
                                   scale[group])
        slope.addmm_(metric[:, columns], part * (grid.spread(scale[group]) - spread[group]))
    return _State.at(now.codes, scale, grid, slope, wanted).where_better(now)


def _fitted(now: _State, grid: Grid, metric: torch.Tensor, wanted: torch.Tensor) -> _State:
    """With the scales that leave the least loss for these codes, rows that get worse by the rounding left alone."""
    groups, rows = now.scale.shape
    parts = now.codes.unflatten(0, (groups, -1))
    size = parts.shape[1]
    system = torch.empty(groups, groups, rows, dtype=torch.float64, device=parts.device)
    for group, part in enumerate(parts):
        # The Hessian is symmetric: a pair of groups is multiplied once.
        products = metric[group * size:, group * size:(group + 1) * size] @ part
        found = (products.unflatten(0, (groups - group, -1)) * parts[group:]).sum(1).double()
        system[group, group:] = found
        system[group:, group] = found
    right = (wanted.unflatten(0, (groups, -1)) * parts).sum(1).double()
    diagonal = system.diagonal(dim1=0, dim2=1).T
    empty = diagonal <= 0  # A group whose codes are all zero fits any scale.
    diagonal += 1e-9 * diagonal.mean(0, keepdim=True) + empty
    solution = torch.linalg.solve_ex(system.permute(2, 0, 1), right.T)[0].T
    good = torch.isfinite(solution) & (solution != 0) & ~empty
    held = grid.spread(now.scale).double()
    scale = grid.storable(torch.where(good, solution, held).float(), now.scale)
    return _State.of(now.codes, scale, grid, metric, wanted).where_better(now)


def _visited(now: _State, grid: Grid, metric: torch.Tensor, wanted: torch.Tensor,
             free: torch.Tensor | None) -> _State:
    """After every column was once given its best code, times `free`."""
    codes, slope, size = now.codes.clone(), now.slope.clone(), len(now.codes) // len(now.scale)
    spread = _spread(now.scale, grid, len(codes))
    steps = (spread * metric.diagonal()[:, None]).reciprocal_()
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        # What the columns before it in its block did to a column is one product when its turn comes; all others get the
        # changes of the block in one.
        inner = metric[start:stop, start:stop]
        changes = torch.empty_like(codes[start:stop])
        for i in range(start, stop):
            done, before = i - start, codes[i]
            local = torch.addmv(slope[i], changes[:done].T, inner[done, :done]) if done else slope[i]
            code = grid.nearest_(torch.addcmul(before, local, steps[i], value=-1), now.scale[i // size])
            if free is not None:
                code *= free[i]
            torch.sub(code, before, out=changes[done]).mul_(spread[i])
            codes[i] = code
        slope.addmm_(metric[:, start:stop], changes)
    return _State.at(codes, now.scale, grid, slope, wanted)
