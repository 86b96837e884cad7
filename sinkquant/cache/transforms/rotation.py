"""Rotations of a head's channels: codes are of rotated states, and attention is what it was.

Scores do not change where the query goes through `query`, nor the output where it comes back through `back`. Keys are
rotated after rotary embedding, because a rotation that mixes its pairs does not commute with it. States are [batch,
heads, ..., D], results float32 alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinkquant.cache.hadamard import rotate


@dataclass(frozen=True)
class Hadamard:
    """The normalised Hadamard matrix, its own inverse, for a power of two channels (QuaRot 2404.00456, section 4)."""

    def into(self, states: torch.Tensor) -> torch.Tensor:
        """States as they are packed; queries that meet such keys alike, and outputs of such values as they were."""
        return rotate(states.float())

    back = into
    query = into

    def of(self, heads: Sequence[int]) -> Hadamard:
        """Every head's is the same."""
        return self


@dataclass(frozen=True, eq=False)
class Basis:
    """A matrix per head.

    Attributes:
        matrix: float32 [heads, D, D]; a state x becomes matrix @ x.
        inverse: float32 [heads, D, D].
    """

    matrix: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of_matrix(cls, matrix: torch.Tensor) -> Basis:
        """From [heads, D, D]; what is inverted in float64 is the matrix as it is kept."""
        kept = matrix.float()
        return cls(kept, torch.linalg.inv(kept.double()).float())

    def into(self, states: torch.Tensor) -> torch.Tensor:
        """States as they are packed."""
        return self._apply(states, self.matrix.mT)

    def back(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `into`; of attention outputs too, which are sums of values."""
        return self._apply(states, self.inverse.mT)

    def query(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries whose products with packed keys are those of the queries with the keys."""
        return self._apply(queries, self.inverse)

    def of(self, heads: Sequence[int]) -> Basis:
        """The matrices of some heads, in this order."""
        chosen = list(heads)
        return Basis(self.matrix[chosen], self.inverse[chosen])

    @staticmethod
    def _apply(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        flat = states.float().flatten(2, -2)
        return (flat @ matrix.to(states.device)).view(states.shape)


Rotation = Hadamard | Basis
