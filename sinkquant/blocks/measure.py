"""What a model loses without some of its blocks: forward passes of a few rows from which blocks are left out.

A trial shares the walk of the whole model up to its first missing block, and the reading of every block's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sinkquant.models import Decoder, Walk
from sinkquant.models.head import what_follows
from sinkquant.models.steps import Progress

PER_WALK = 8
"""Trials that share a walk: each keeps hidden states of its own."""


@dataclass(frozen=True)
class Loss:
    """Mean KL(whole || without) over tokens, nats, and the share of it that stands at marked tokens."""

    divergence: float
    sink_share: float


@dataclass
class BlockTrials:
    """Leaves blocks out of a decoder and looks at what it predicts.

    Attributes:
        rows: int64 [rows, length]. marked: bool [rows, length], first positions and sinks.
        influence: 1 - the mean cosine of a token's state before and after every block, once a walk has ended.
    """

    decoder: Decoder
    rows: torch.Tensor
    marked: torch.Tensor
    batch_size: int
    device: str
    dtype: torch.dtype
    progress: Progress | None = None
    influence: list[float] = field(default_factory=list)

    def losses(self, trials: Sequence[frozenset[int]]) -> list[Loss]:
        """What the model loses without each of these sets of blocks, everything else as it is."""
        found: list[Loss] = []
        for start in range(0, max(1, len(trials)), PER_WALK):
            found += self._walk(trials[start:start + PER_WALK])
        return found

    def _walk(self, trials: Sequence[frozenset[int]]) -> list[Loss]:
        walk = Walk(self.decoder, self.rows, self.batch_size, self.device, self.dtype)
        hidden: dict[int, torch.Tensor] = {}
        influence = []
        for step in walk.steps():
            for index, trial in enumerate(trials):
                if step.index in trial:
                    hidden.setdefault(index, walk.hidden)
                elif index in hidden:
                    hidden[index] = step.replay(hidden[index])
            before = walk.hidden
            influence.append(1 - float(torch.cosine_similarity(before.float(), step.run().float(), dim=-1).mean()))
            if self.progress:
                self.progress(step.index + 1, len(self.decoder.blocks), "leaving blocks out")
        self.influence = influence
        return self._divergences(walk.hidden, [hidden.get(index, walk.hidden) for index in range(len(trials))])

    def _divergences(self, whole: torch.Tensor, others: Sequence[torch.Tensor]) -> list[Loss]:
        """From what the last block gave, [rows, length, hidden_size]; the logits of a row at a time are in memory."""
        found = torch.zeros(len(others), *self.rows.shape, dtype=torch.float64)
        with what_follows(self.decoder, self.device, self.dtype) as logits:
            for row in range(len(self.rows)):
                before = torch.log_softmax(logits(whole[row]), -1)
                for index, states in enumerate(others):
                    # Both add up to 1: so written, no term is below zero, and a small sum stays exact.
                    change = torch.log_softmax(logits(states[row]), -1).sub_(before)
                    found[index, row] = (before.exp() * (change.expm1() - change)).sum(-1).double().cpu()
        return [Loss(float(one.mean()), float(one[self.marked].sum() / one.sum().clamp(min=1e-30))) for one in found]
