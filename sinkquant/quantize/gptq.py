"""GPTQ (Frantar et al. 2210.17323): round column by column and let the columns to come make up for the error; and its
asymmetric calibration, GPTAQ (Li et al. 2504.02692)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.descent import descend
from sinkquant.quantize.factor import damped_hessian, inverse_factor
from sinkquant.schemes.codecs.integer_scales import searched_scales
from sinkquant.schemes.codecs.packed import PackedWeight, group_scales, to_codes

BLOCK = 128


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
    """

    bits: int
    group_size: int
    damping: float = 0.01
    act_order: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    scale_search: bool = True
    asymmetry: float = 0.25
    passes: int = 3

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, name: str = "weight",
                 cross: torch.Tensor | None = None, kept: torch.Tensor | None = None) -> PackedWeight:
        """Quantize one matrix.

        Args:
            weight: float [rows, columns]. hessian: [columns, columns], symmetric, any scale.
            cross: GPTAQ: [columns, columns], the sum over tokens of (x' - x) x^T, x' the input in the unquantized
                model, on the scale of the Hessian. None: plain GPTQ.
            kept: bool [rows, columns], the weights that pruning leaves: the others get the code 0, which the columns to
                come make up for as for any rounding (SparseGPT 2301.00774, section 3.5). None: all.

        Raises:
            SinkquantError: the Hessian is not finite, or not positive definite with this damping.
        """
        rows, columns = weight.shape
        size = columns if self.group_size == -1 else self.group_size
        order = self._order(hessian.diagonal(), size)
        damped, mean = damped_hessian(hessian, self.damping, name)
        inverse = inverse_factor(damped[order][:, order], self.damping, name)
        drift = None if cross is None else self._drift(cross[order][:, order].double() / mean, inverse)
        work = weight[:, order].float().clone()
        pruned = None if kept is None else ~kept[:, order]
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        scale = torch.empty(rows, columns // size, dtype=self.scale_dtype, device=weight.device)
        step = BLOCK if size == columns else size * max(1, BLOCK // size)
        current = scale[:, 0]
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            errors = torch.zeros(rows, stop - start, device=weight.device)
            before = torch.zeros(rows, stop - start, device=weight.device)
            for i in range(start, stop):
                if i % size == 0:
                    group = work[:, i:i + size]
                    if pruned is not None:  # zeros fit any scale
                        group = group.masked_fill(pruned[:, i:i + size], 0)
                    current = self._scale(group, inverse.diagonal()[i:i + size])
                    scale[:, int(order[i]) // size] = current
                column = work[:, i:i + 1].clone()
                code = to_codes(column, current[:, None], self.bits)
                if pruned is not None:
                    code.masked_fill_(pruned[:, i:i + 1], 0)
                codes[:, order[i]] = code[:, 0]
                error = (column - code.float() * current[:, None].float()) / inverse[i, i]
                work[:, i + 1:stop] -= error * inverse[i, i + 1:stop]
                errors[:, i - start] = error[:, 0]
                if drift is not None:
                    work[:, i + 1:stop] += column * drift[i, i + 1:stop]
                    before[:, i - start] = column[:, 0]
            work[:, stop:] -= errors @ inverse[start:stop, stop:]
            if drift is not None:
                work[:, stop:] += before @ drift[start:stop, stop:]
        packed = PackedWeight(codes, scale, self.bits)
        if self.passes == 0:
            return packed
        pull = None if cross is None else self.asymmetry * (weight.float() @ (cross / mean).float())
        return descend(packed, weight, damped, self.passes, order, pull, kept)

    def _scale(self, group: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The scale of one group: [rows] from weights [rows, size] and the factor's diagonal [size]."""
        if self.scale_search:
            return searched_scales(group, self.bits, -1, self.scale_dtype, factor.double().square().reciprocal())[:, 0]
        return group_scales(group, self.bits, -1, self.scale_dtype)[:, 0]

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
