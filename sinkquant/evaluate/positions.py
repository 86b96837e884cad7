"""Where in a row of text a model diverges: means over bins of positions."""

from __future__ import annotations

import torch

from sinkquant.artifacts.report import PositionLoss

POSITIONS = (0, 1, 4, 32, 128, 512, 2048)
"""Where bins begin: the first token by itself, then what sees few tokens, then more."""


def bins(length: int) -> list[tuple[int, int]]:
    """(first, behind the last) position of every bin of a row of `length` tokens."""
    starts = [start for start in POSITIONS if start < length]
    return list(zip(starts, [*starts[1:], length], strict=True))


def binned(kl: torch.Tensor) -> torch.Tensor:
    """Means over the bins, [rows, bins]. kl: nats, [rows, length]."""
    return torch.stack([kl[:, start:end].mean(1) for start, end in bins(kl.shape[1])], dim=1)


def by_position(kl: torch.Tensor) -> list[PositionLoss]:
    """Means over rows and bins. kl: nats, [rows, length]."""
    return named(binned(kl), kl.shape[1])


def named(means: torch.Tensor, length: int) -> list[PositionLoss]:
    """What `binned` gives of rows of `length` tokens, their mean with the names of the bins."""
    return [PositionLoss(first=start, last=end - 1, kl=value)
            for (start, end), value in zip(bins(length), means.mean(0).tolist(), strict=True)]
