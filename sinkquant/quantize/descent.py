"""Coordinate descent on the loss that GPTQ leaves (QuantEase, Behdin et al. 2309.01885), with scales fitted in between.

GPTQ never comes back to a column, nor to a scale whose codes were changed by what came later. Here all other weights
held fixed, the best code of a column is known in closed form, and so are the best scales of a row for its codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes.codecs.integer_scales import storable
from sinkquant.schemes.codecs.packed import PackedWeight

BLOCK = 128
CHUNK = 1 << 24
"""Weights that are worked on at a time."""


def descend(packed: PackedWeight, weight: torch.Tensor, hessian: torch.Tensor, passes: int,
            order: torch.Tensor | None = None, pull: torch.Tensor | None = None,
            kept: torch.Tensor | None = None) -> PackedWeight:
    """Lower trace((Q - W) H (Q - W)^T) - 2 trace((Q - W) P^T), where Q is what the codes and scales give.

    Every pass fits the scales of a row to its codes and then visits every column once. No row ends with a larger loss
    than it came with.

    Args:
        weight: float [rows, columns]. hessian: [columns, columns], positive definite, so with its damping.
        order: the columns in the order of visits; None: from left to right.
        pull: P, [rows, columns]: what asymmetric calibration asks for beside W; None: nothing.
        kept: bool [rows, columns]; where it is False the code is 0 and stays 0. None: all codes may change.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    metric = hessian.float()
    codes, scale = packed.codes.clone(), packed.scale.clone()
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        wanted = weight[rows].float() @ metric
        if pull is not None:
            wanted += pull[rows].float()
        free = None if kept is None else kept[rows].float()
        codes[rows], scale[rows] = _descend(codes[rows], scale[rows], packed.bits, metric, wanted, passes, order, free)
    return PackedWeight(codes, scale, packed.bits)


def _descend(codes: torch.Tensor, scale: torch.Tensor, bits: int, metric: torch.Tensor, wanted: torch.Tensor,
             passes: int, order: torch.Tensor,
             free: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    best = now = _State.of(codes, scale, metric, wanted)
    for _ in range(passes):
        now = _fitted(now, bits, metric, wanted)
        codes = _visited(now, bits, metric, wanted, order, free)
        now = _State.of(codes, now.scale, metric, wanted)
        best = now.where_better(best)
    return best.codes, best.scale


@dataclass(frozen=True)
class _State:
    """Codes int8 [rows, columns] and scales [rows, groups] with what takes a product as large as the Hessian to know:
    `product` is Q H [rows, columns], `loss` Q H Q^T - 2 Q B^T of every row, float64 [rows], the loss less what no code
    changes; B is `wanted`."""

    codes: torch.Tensor
    scale: torch.Tensor
    product: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def of(cls, codes: torch.Tensor, scale: torch.Tensor, metric: torch.Tensor, wanted: torch.Tensor) -> _State:
        new = codes.float() * _spread(scale, codes.shape[1])
        product = new @ metric
        return cls(codes, scale, product, (new * (product - 2 * wanted)).sum(1, dtype=torch.float64))

    def where_better(self, other: _State) -> _State:
        """Of every row the state with less loss; the other's where they are equal."""
        better = self.loss < other.loss
        rows = better[:, None]
        return _State(torch.where(rows, self.codes, other.codes), torch.where(rows, self.scale, other.scale),
                      torch.where(rows, self.product, other.product), torch.where(better, self.loss, other.loss))


def _spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    return scale.float().repeat_interleave(columns // scale.shape[1], dim=1)


def _fitted(now: _State, bits: int, metric: torch.Tensor, wanted: torch.Tensor) -> _State:
    """With the scales that leave the least loss for these codes, rows that get worse by the rounding left alone."""
    rows, groups = now.scale.shape
    parts = now.codes.float().unflatten(1, (groups, -1))
    size = parts.shape[2]
    system = torch.empty(rows, groups, groups, dtype=torch.float64, device=parts.device)
    for group, part in enumerate(metric.split(size)):
        # The Hessian is symmetric: a pair of groups is multiplied once.
        products = parts[:, group] @ part[:, group * size:]
        found = (products.unflatten(1, (groups - group, -1)) * parts[:, group:]).sum(-1).double()
        system[:, group, group:] = found
        system[:, group:, group] = found
    right = (wanted.unflatten(1, (groups, -1)) * parts).sum(-1).double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # A group whose codes are all zero fits any scale.
    diagonal += 1e-9 * diagonal.mean(1, keepdim=True) + empty
    solution = torch.linalg.solve_ex(system, right)[0]
    good = torch.isfinite(solution) & (solution != 0) & ~empty
    scale = storable(torch.where(good, solution, now.scale.double()).float(), bits, now.scale.dtype)
    return _State.of(now.codes, scale, metric, wanted).where_better(now)


def _visited(now: _State, bits: int, metric: torch.Tensor, wanted: torch.Tensor, order: torch.Tensor,
             free: torch.Tensor | None) -> torch.Tensor:
    """The codes after every column was once given its best code, times `free`; int8 [rows, columns]."""
    codes = now.codes.float()
    spread = _spread(now.scale, codes.shape[1])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    slope = now.product - wanted
    for columns in order.split(BLOCK):
        # Within a block the slope is kept up to date; the other columns get the changes of the block in one product.
        inner, local = metric[columns][:, columns], slope[:, columns]
        before = codes[:, columns]
        changes = torch.zeros_like(before)
        width, steep = spread[:, columns], inner.diagonal()
        for i in range(len(columns)):
            code = torch.clamp(torch.round(before[:, i] - local[:, i] / (steep[i] * width[:, i])), low, high)
            if free is not None:
                code *= free[:, columns[i]]
            changes[:, i] = (code - before[:, i]) * width[:, i]
            before[:, i] = code
            local += changes[:, i:i + 1] * inner[i]
        codes[:, columns] = before
        slope += changes @ metric[columns]
    return codes.to(torch.int8)
