"""Orthogonal matrices that spread an outlier over all channels: randomized Hadamard matrices of any width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Rotation:
    """Random signs, then a Hadamard matrix over the root of its width (QuaRot 2404.00456, section 4). More channels are
    taken in blocks of that width, all by the same matrix.

    A width that is no power of two is a Kronecker product of Sylvester's matrix with one of Paley's, or, where there
    is none of a fitting size, with a random orthogonal matrix of the odd factor. `centred`: the vector of ones is left
    where it is, so that a norm that takes the mean off sees the same spread: the signs stand between the matrix and its
    transpose then, the first of them positive.
    """

    width: int
    seed: int
    centred: bool = False

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., blocks * width] in float64 times the matrix, block by block."""
        parts = x.unflatten(-1, (-1, self.width))
        if self.centred:
            turned = self._product(self._product(parts, transposed=False) * self._signs, transposed=True)
        else:
            turned = self._product(parts * self._signs, transposed=False)
        return turned.flatten(-2)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The transposed matrix times x, float64 [..., blocks * width, columns]."""
        return self.apply(x.transpose(-1, -2)).transpose(-1, -2)

    @cached_property
    def _signs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.width,), generator=generator, dtype=torch.float64) * 2 - 1
        if self.centred:
            signs[0] = 1
        return signs

    @cached_property
    def _factor(self) -> torch.Tensor:
        """The factor whose width is no power of two, [m, m] orthogonal with a constant first column; [1, 1] if none."""
        odd = self.width // (self.width & -self.width)
        if odd == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        order = 4 * odd
        while self.width % order == 0:
            found = paley(order)
            if found is not None:
                return (found * found[:, :1]) / math.sqrt(order)
            order *= 2
        generator = torch.Generator().manual_seed(self.seed)
        free = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        free[:, 0] = 1
        q, r = torch.linalg.qr(free)
        return q * r.diagonal().sign()

    def _product(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """x times the Kronecker product of the factor and Sylvester's matrix. The sums of the latter are made one by
        one, so that the result for a row does not depend on what rows stand beside it."""
        size = len(self._factor)
        power = self.width // size
        y = x.reshape(*x.shape[:-1], size, power)
        half = 1
        while half < power:
            a, b = y.unflatten(-1, (power // (2 * half), 2, half)).unbind(-2)
            y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
            half *= 2
        if size > 1:
            factor = self._factor if transposed else self._factor.T
            y = torch.matmul(factor, y)
        return (y * power**-0.5).reshape(x.shape)


def paley(order: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix of that order, float64 of ones and minus ones, or None: his first construction needs a
    prime order - 1, the second a prime order / 2 - 1 that leaves 1 over 4."""
    if order % 4 == 0 and _prime(order - 1):
        q = order - 1
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(q)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0 and _prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        half = order // 2
        symmetric = torch.zeros(half, half, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _residues(half - 1)
        unit = torch.eye(half, dtype=torch.float64)
        return torch.kron(symmetric, torch.tensor([[1.0, 1], [1, -1]]).double()) + torch.kron(
            unit, torch.tensor([[1.0, -1], [-1, -1]]).double())
    return None


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _residues(prime: int) -> torch.Tensor:
    """Jacobsthal's matrix: entry (i, j) is 1 where i - j is a square modulo the prime, -1 where not, 0 for i = j."""
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)]).double()
    places = torch.arange(prime)
    return character[(places[:, None] - places[None, :]) % prime]
