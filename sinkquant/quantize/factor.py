"""The damped Hessian and the Cholesky factor of its inverse, which everything needs that makes up for errors."""

from __future__ import annotations

import torch

from sinkquant.errors import SinkquantError


def damped_hessian(hessian: torch.Tensor, damping: float, name: str) -> tuple[torch.Tensor, float]:
    """The damped Hessian over its mean diagonal, float64 [columns, columns], and that mean: no method here depends on
    the Hessian's scale, and a mean of 1 keeps the factor inside float32's range.

    Raises:
        SinkquantError: the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise SinkquantError(f"the Hessian of {name} is not finite; check the calibration text and the weights.")
    mean = float(hessian.diagonal().double().mean())
    unit = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    if mean <= 0:  # No token reached this input: every error is as good as any other.
        return unit, 1.0
    return hessian.double() / mean + damping * unit, mean


def inverse_factor(damped: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse, float32 [columns, columns]. U[i, i]^2 is what the inverse has on its
    diagonal at i once the columns before i are fixed.

    Raises:
        SinkquantError: it is not positive definite with this damping.
    """
    # With the columns in reverse, the factor of H itself is the inverse of U: one Cholesky and one triangular inverse.
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise SinkquantError(f"the Hessian of {name} is singular with weights.damping {damping}; "
                             "raise it or give more calibration rows.")
    unit = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), unit, upper=True).float()
