"""Quantize a weight some of whose columns and single weights stay in 16 bits beside the codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sinkquant.errors import SinkquantError
from sinkquant.methods import Method, Problem
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import PackedWeight

Solve = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], PackedWeight]
"""(weight, Hessian, cross) -> packed weight: any method."""


@dataclass(frozen=True)
class Split:
    """Takes `columns` and `scalars` out of the groups before a method sees their ranges, for any method.

    With `compensate` the exact columns make up for the error of the others, as if GPTQ visited them last and without
    error. Of the loss trace(E H E^T) the best they can do is E_e = -E_q H_qe H_ee^-1, which leaves the others with
    trace(E_q S E_q^T), S = H_qq - H_qe H_ee^-1 H_eq: the method is given S. Without it they keep their values.

    Asymmetric calibration (`cross`, GPTAQ) adds -2 trace(E P^T), P = a W C, to the loss: the exact columns take their
    share of P too, and what they and the scalars pull the others by is a shift of the weight to be quantized.

    `damping`: share of the mean diagonal added to H_ee. `asymmetry`: a, as in `GPTQ`.
    """

    columns: tuple[int, ...]
    scalars: tuple[tuple[int, int], ...]
    scale_dtype: torch.dtype
    compensate: bool
    damping: float = 0.01
    asymmetry: float = 0.25

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor | None, solve: Solve,
                 cross: torch.Tensor | None = None, name: str = "weight") -> PackedWeight:
        """Quantize one matrix.

        Args:
            weight: float [rows, columns]. hessian, cross: [columns, columns] as in `GPTQ.quantize`.

        Raises:
            SinkquantError: the Hessian of the exact columns is singular.
        """
        kept = torch.tensor(self.columns, dtype=torch.long, device=weight.device)
        rest = weight.float().clone()
        rest[:, kept] = 0
        places = torch.tensor(self.scalars, dtype=torch.int32, device=weight.device).reshape(-1, 2)
        row, column = places[:, 0].long(), places[:, 1].long()
        values = rest[row, column].to(self.scale_dtype)
        rest[row, column] -= values.float()
        if hessian is None or not self.compensate:
            packed = solve(rest, hessian if hessian is None else _without(hessian, kept), None)
            exact = weight[:, kept].float()
        else:
            packed, exact = self._compensated(weight.float(), rest, kept, hessian.double(), solve, cross, name)
        # At a column that was taken out the weight is 0 and no error is counted, so that any code would do there.
        codes = packed.codes.clone()
        codes[:, kept] = 0
        outliers = Outliers(kept.to(torch.int32), exact.to(self.scale_dtype), places, values)
        return replace(packed, codes=codes, outliers=outliers)

    def _compensated(self, weight: torch.Tensor, rest: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor,
                     solve: Solve, cross: torch.Tensor | None, name: str) -> tuple[PackedWeight, torch.Tensor]:
        """The packed rest, and the exact columns [rows, kept] that make up for its error."""
        if not torch.isfinite(hessian).all():
            raise SinkquantError(f"the Hessian of {name} is not finite; check the calibration text and the weights.")
        mean = float(hessian.diagonal().mean()) or 1.0
        inner = hessian[kept][:, kept] + self.damping * mean * torch.eye(len(kept)).to(hessian)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            raise SinkquantError(f"the Hessian of {name} is singular with weights.damping {self.damping}; "
                                 "raise it or give more calibration rows.")
        across = hessian[kept]
        share = torch.cholesky_solve(across, factor)  # H_ee^-1 H_eq, [kept, columns]
        reduced = hessian - across.T @ share
        reduced[kept] = 0
        reduced[:, kept] = 0
        target, drawn = rest, None
        pull = torch.zeros_like(weight[:, kept], dtype=torch.float64)
        if cross is not None:
            far = cross.double()
            drawn = far - far[:, kept] @ share
            pull = self.asymmetry * weight.double() @ far[:, kept]
            fixed = self.asymmetry * (weight - rest).double() @ drawn
            fixed[:, kept] = 0
            drawn = _without(drawn, kept)
            # The weight T whose own pull, a T C, together with T S asks for what W and all of its pull ask for.
            system = reduced + self.asymmetry * drawn + self.damping * mean * torch.eye(len(reduced)).to(reduced)
            target = rest + torch.linalg.solve(system.T, fixed.T).T.float()
        packed = solve(target, reduced, drawn)
        error = packed.dequantized().double() - rest.double()
        error[:, kept] = 0
        change = torch.cholesky_solve((pull - error @ across.T).T, factor).T
        return packed, weight[:, kept] + change.float()


def solve_beside(method: Method, problem: Problem, columns: Sequence[int],
                 scalars: Sequence[tuple[int, int]]) -> PackedWeight:
    """What a method makes of a matrix, some columns and single weights of which stand beside the codes. A method that
    takes no Hessian makes up for nothing, so that there the exact columns keep their values.

    Raises:
        SinkquantError: as the method, or the Hessian of the exact columns is singular.
    """
    split = Split(tuple(columns), tuple(scalars), problem.scale_dtype, method.needs_hessian, problem.settings.damping)

    def solve(weight: torch.Tensor, hessian: torch.Tensor | None, cross: torch.Tensor | None) -> PackedWeight:
        return method.solve(replace(problem, weight=weight, hessian=hessian, cross=cross, factored=None))

    return split.quantize(problem.weight, problem.hessian, solve, problem.cross, problem.name)


def _without(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A matrix [columns, columns] in which some columns are never read."""
    matrix = matrix.clone()
    matrix[kept] = 0
    matrix[:, kept] = 0
    return matrix
