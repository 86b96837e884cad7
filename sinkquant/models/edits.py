"""A change of a parameter that is made whenever the parameter is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sinkquant.models.shards import StoredTensor

PIECE = 1 << 22
"""Values that are edited at a time where rows do not depend on one another."""


@dataclass(frozen=True)
class Edit:
    """Steps that take a tensor to one of its shape, carried out in float64 and rounded once at the end.

    `by_rows`: a row of the result depends on that row alone. Parameters of three dimensions are edited matrix by
    matrix.
    """

    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    by_rows: bool = False

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The edited tensor, in the dtype of `tensor`."""
        if tensor.dim() == 3:
            step = 1
        elif self.by_rows and tensor.dim() == 2:
            step = max(1, PIECE // max(1, tensor.shape[1]))
        else:
            return self._whole(tensor)
        edited = torch.empty_like(tensor)
        for start in range(0, len(tensor), step):
            edited[start:start + step] = self._whole(tensor[start:start + step])
        return edited

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.double()
        for step in self.steps:
            wide = step(wide)
        return wide.to(tensor.dtype)


@dataclass(frozen=True)
class EditedTensor:
    """A tensor on disk whose rows are edited when they are read."""

    stored: StoredTensor
    edit: Edit
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        return self.stored.shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows start..stop along the first dimension."""
        return self.edit(self.stored.rows(start, stop).to(self.dtype))

    def pick(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows, [len(ids), ...]. ids: int64, ascending."""
        return self.edit(self.stored.pick(ids).to(self.dtype))
