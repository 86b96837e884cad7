"""A tensor as it lies in a file, read with plain file reads, so that what is resident is what is being used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PIECE = 1 << 25
"""Values of a large tensor that are read at a time."""


def runs_of_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """All rows of such a tensor as (start, stop), in runs of `PIECE` values at most, or of one row."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file, `offset` bytes from its start."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.rows(0, self.shape[0]) if self.shape else self._read(0, 1).reshape(())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows start..stop along the first dimension."""
        row = math.prod(self.shape[1:])
        return self._read(start * row, (stop - start) * row).reshape(stop - start, *self.shape[1:])

    def pick(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows, [len(ids), ...]. ids: int64, ascending; rows beside one another are read at once."""
        picked = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
        breaks = (torch.nonzero(ids.diff() != 1).flatten() + 1).tolist()
        for first, last in zip([0, *breaks], [*breaks, len(ids)], strict=True):
            if last > first:
                picked[first:last] = self.rows(int(ids[first]), int(ids[last - 1]) + 1)
        return picked

    def _read(self, start: int, count: int) -> torch.Tensor:
        values = torch.empty(count, dtype=self.dtype)
        if count:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                view, done = values.view(torch.uint8).numpy().data, 0
                while done < len(view):
                    read = file.readinto(view[done:])
                    if not read:
                        raise OSError(f"{self.path} ended early")
                    done += read
        return values
