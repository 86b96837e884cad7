"""Perturbation spread: one token is swapped; how far and how strongly does the change travel?"""

from __future__ import annotations

import torch

from sinkquant.artifacts.diagnosis import Spread
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.rows import swapped
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import Decoder

REACHED = 0.05
"""A position is reached where its hidden state changes by more than this share of its norm."""
BINS = 32


def changes(decoder: Decoder, rows: torch.Tensor, position: int, compute: WalkSettings) -> torch.Tensor:
    """||delta h|| / ||h|| after every block, float64 [layers, rows, length], when the token at `position` is another.

    Both versions of a row go through the model in one walk, so that rounding is the same.
    """
    both = torch.cat([rows, swapped(rows, position, compute.seed)])
    walk = compute.walk(decoder, both)
    found = []
    for step in walk.steps():
        before, after = step.run().double().split(len(rows))
        found.append(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-300)).cpu())
    return torch.stack(found)


def spread(decoder: Decoder, rows: torch.Tensor, position: int, with_bos: bool, compute: WalkSettings) -> Spread:
    """The spread over the rows (Barbero et al. 2504.02732: with `<bos>` it is far smaller).

    Args:
        rows: int64 [rows, length]; position: of the swapped token, which is neither the first nor the last.
    """
    found = changes(decoder, rows, position, compute)
    width = max(1, -(-rows.shape[1] // BINS))
    starts = list(range(0, rows.shape[1], width))
    bins = torch.stack([part.mean(-1) for part in found.mean(1).split(width, dim=-1)], dim=-1)
    later = found[-1, :, position + 1:]
    return Spread(with_bos=with_bos, position=position, length=rows.shape[1], starts=starts, changes=bins.tolist(),
                  strength=measured(later.mean(1), compute.seed),
                  reach=measured((later > REACHED).double().mean(1), compute.seed), threshold=REACHED)
