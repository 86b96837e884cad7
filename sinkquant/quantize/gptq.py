"""GPTQ (Frantar et al. 2210.17323): round column by column and let the columns to come make up for the error; and its
asymmetric calibration, GPTAQ (Li et al. 2504.02692)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sinkquant.quantize.descent import descend
from sinkquant.quantize.factor import damped_hessian, inverse_factor
from sinkquant.schemes.codecs.grid import Grid, IntegerGrid
from sinkquant.schemes.codecs.packed import PackedWeight

BLOCK = 64
Factored = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]
"""The order in which columns are visited; the damped Hessian in it, over its mean diagonal; that mean; U."""


@dataclass(frozen=True)
class GPTQ:
    """Symmetric GPTQ with act-order by group.

    Groups keep their place in the matrix, so that no index is stored: with `act_order` whole groups are visited in the
    order of their share of the Hessian's diagonal, and the columns of a group likewise. A group's scale is taken when
    the group is entered, from weights that already make up for earlier errors: the one that reaches the largest
    weight, or with `scale_search` the one that leaves the least loss. An error in a column costs its square over the
    square of that column's entry on the diagonal of the inverse Hessian's Cholesky factor, all that later columns can
    make up for taken off, so that this is the metric of the search.

    `asymmetry` is how much of the difference between what the unquantized model would feed this layer and what it
    gets is made up for (GPTAQ; its authors take 0.25); it needs `cross`. `passes` rounds of coordinate descent follow.
    `grid`: the numbers that a weight may take; None: integers of `bits` with scales in `scale_dtype`.
    """

    bits: int
    group_size: int
    damping: float = 0.01
    act_order: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    scale_search: bool = True
    asymmetry: float = 0.25
    passes: int = 3
    grid: Grid | None = None

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, name: str = "weight",
                 cross: torch.Tensor | None = None, kept: torch.Tensor | None = None,
                 factored: dict[Any, Factored] | None = None) -> PackedWeight:
        """Quantize one matrix.

        Args:
            weight: float [rows, columns]. hessian: [columns, columns], symmetric, any scale.
            cross: GPTAQ: [columns, columns], the sum over tokens of (x' - x) x^T, x' the input in the unquantized
                model, on the scale of the Hessian. None: plain GPTQ.
            kept: bool [rows, columns], the weights that pruning leaves: the others get the code 0, which the columns to
                come make up for as for any rounding (SparseGPT 2301.00774, section 3.5). None: all.
            factored: filled for other calls with the same Hessian, and read by them.

        Raises:
            SinkquantError: the Hessian is not finite, or not positive definite with this damping.
        """
        columns = weight.shape[1]
        size = columns if self.group_size == -1 else self.group_size
        factored = {} if factored is None else factored
        key = size, self.damping, self.act_order
        if key not in factored:
            factored[key] = self._factored(hessian, size, name)
        order, damped, mean, factor = factored[key]
        drift = None if cross is None else self._drift(cross[order][:, order].double() / mean, factor)
        work, kept = weight[:, order], None if kept is None else kept[:, order]
        packed = self._in_order(work, size, factor, drift, kept)
        if self.passes:
            pull = None if cross is None else self.asymmetry * (weight.float() @ (cross / mean).float())[:, order]
            packed = descend(packed, work, damped, self.passes, pull, kept, self.grid)
        back = order.argsort()
        return self._on().weight(packed.codes[:, back], packed.scale[:, back[::size] // size])

    def _factored(self, hessian: torch.Tensor, size: int, name: str) -> Factored:
        order = self._order(hessian.diagonal(), size)
        damped, mean = damped_hessian(hessian, self.damping, name)
        damped = damped[order][:, order]
        return order, damped, mean, inverse_factor(damped, self.damping, name)

    def _in_order(self, weight: torch.Tensor, size: int, factor: torch.Tensor, drift: torch.Tensor | None,
                  kept: torch.Tensor | None) -> PackedWeight:
        """Quantize columns from the first to the last, groups one after the other.

        A column of the weight is a row of memory here. What the columns before it in its block cost it is one product
        when its turn comes; the columns after the block get all of the block's errors in one.

        Args:
            factor: U, the upper Cholesky factor of the inverse Hessian. drift: as `_drift` has it.
        """
        work = weight.T.float().contiguous()
        free = None if kept is None else kept.T.float().contiguous()
        # An error e in column i is made up for by e U[i, j] / U[i, i] in column j.
        shares = (factor / factor.diagonal()[:, None]).T.contiguous()
        gains = None if drift is None else drift.T.contiguous()
        columns, rows = work.shape
        grid = self._on()
        codes, real = torch.empty(columns, rows, dtype=torch.int8, device=work.device), torch.empty_like(work[0])
        scales = []
        for group in range(0, columns, size):
            entered = work[group:group + size] if free is None else work[group:group + size] * free[group:group + size]
            scales.append(self._scale(grid, entered.T.contiguous(), factor.diagonal()[group:group + size]))
            scale = grid.spread(scales[-1])
            for start in range(group, group + size, BLOCK):
                stop = min(start + BLOCK, group + size)
                errors = torch.empty(stop - start, rows, device=work.device)
                for i in range(start, stop):
                    done, column = i - start, work[i]
                    if done:
                        column.addmv_(errors[:done].T, shares[i, start:i], alpha=-1)
                        if gains is not None:
                            column.addmv_(work[start:i].T, gains[i, start:i])
                    grid.nearest_(torch.div(column, scale, out=real), scales[-1])
                    if free is not None:
                        real *= free[i]
                    codes[i] = real
                    torch.addcmul(column, real, scale, value=-1, out=errors[done])
                work[stop:].addmm_(shares[stop:, start:stop], errors, alpha=-1)
                if gains is not None:
                    work[stop:].addmm_(gains[stop:, start:stop], work[start:stop])
        return grid.weight(codes.T.contiguous(), torch.stack(scales, dim=1))

    def _on(self) -> Grid:
        return self.grid or IntegerGrid(self.bits, self.scale_dtype)

    def _scale(self, grid: Grid, group: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The scale of one group: [rows] from weights [rows, size] and the factor's diagonal [size]."""
        importance = factor.double().square().reciprocal() if self.scale_search else None
        return grid.scales(group, importance, self.scale_search)[:, 0]

    def _drift(self, cross: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """How much of column i, in the visiting order, is added to the columns after it: float32 [columns, columns],
        strictly upper triangular."""
        factor = inverse.double()
        return (self.asymmetry * torch.triu(cross @ factor.T, diagonal=1) @ factor).float()

    def _order(self, diagonal: torch.Tensor, size: int) -> torch.Tensor:
        columns = torch.arange(len(diagonal), device=diagonal.device)
        if not self.act_order:
            return columns
        grouped = diagonal.reshape(-1, size)
        groups = grouped.sum(1).argsort(descending=True, stable=True)
        inside = grouped.argsort(dim=1, descending=True, stable=True)
        return (groups[:, None] * size + inside[groups]).flatten()
