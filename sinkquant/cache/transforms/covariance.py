"""Matrices from second moments: channels in which rounding does least harm.

Keys of one number of bits per channel, rounded in ranges of their own, err in proportion to a channel's spread, and
what a query makes of it is in proportion to the query's own size there. With covariance K of a head's keys and second
moment Q of its queries the error of the scores is the sum over channels of (T K T')_ii (T^-T Q T^-1)_ii. A T that is
orthogonal and mixes all channels evenly (QuaRot 2404.00456, OSCAR 2605.17757) makes that tr K tr Q / D; the best T
makes it (tr (K^1/2 Q K^1/2)^1/2)^2 / D, which is never more: both covariances become the same and even. Values are
rounded in ranges per token, whose errors are alike in all channels whatever is done: a rotation is all that pays.
"""

from __future__ import annotations

import math

import torch

from sinkquant.cache.hadamard import rotate

RIDGE = 1e-4
"""Of the mean variance, added to every channel: directions that the text never used are left finite."""


def balancing(states: torch.Tensor, readers: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """The matrix T for which T x and T^-T q have the same covariance, with even diagonals.

    Args:
        states, readers: float64 [heads, D, D], second moments of what is packed, and of what it is multiplied with.
        share: of the spectrum that both have together, what T x keeps of it, as a power; the rest is left to T^-T q.

    Returns:
        float64 [heads, D, D].
    """
    spread, directions = torch.linalg.eigh(_ridged(states))
    root = directions * spread.sqrt()[:, None] @ directions.mT
    inverse = directions * spread.rsqrt()[:, None] @ directions.mT
    shared, axes = torch.linalg.eigh(root @ _ridged(readers) @ root)
    return flat(states.shape[-1]) @ (shared.clamp(min=0).pow(share / 2)[..., None] * axes.mT) @ inverse


def read_by(matrix: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """Second moment of T^-T q, float64 [heads, D, D]. See `balancing`; matrix: T."""
    inverse = torch.linalg.inv(matrix)
    return inverse.mT @ _ridged(readers) @ inverse


def spreading(states: torch.Tensor) -> torch.Tensor:
    """The rotation that gives every channel the same variance: principal axes, evenly mixed. See `balancing`."""
    return flat(states.shape[-1]) @ torch.linalg.eigh(_ridged(states))[1].mT


def flat(width: int) -> torch.Tensor:
    """An orthogonal float64 [D, D] that mixes channels evenly: Hadamard's for the power of two in D, and Hartley's
    among the neighbours that are left, whose sizes differ least where channels are sorted."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    place = torch.arange(odd)
    angle = 2 * math.pi / odd * (place[:, None] * place % odd).double()
    hartley = (angle.cos() + angle.sin()) * odd**-0.5
    return torch.kron(rotate(torch.eye(width // odd, dtype=torch.float64)).double(), hartley)


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    """With something in every direction; a head that is all zeros becomes the identity."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
    return moment + ridge[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype)
