"""The ruler: the KL of a model from the baseline on a few rows, as served and with anything put right."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan
from sinkquant.evaluate.states import last_states
from sinkquant.explain.stream import Stream, recorded
from sinkquant.models.head import OutputHead, runs_of_positions

KEPT_VALUES = 1 << 28
"""Predictions of the baseline that are kept, 1 GB in float32; where there are more they are made anew every time."""


@dataclass(frozen=True)
class Probe:
    """Rows of content tokens, which every model reads behind tokens of its own.

    Attributes:
        original: the baseline. content: int64 [rows, length], without what a tokenizer puts in front.
        front, served: what the baseline's tokenizer puts in front, and the checkpoint's.
        states: the baseline's, of every row. kv: the packed cache that the checkpoint is read through.
        stream: what the baseline's blocks make of every row.
    """

    original: PreTrainedModel
    content: torch.Tensor
    front: tuple[int, ...]
    served: tuple[int, ...]
    states: torch.Tensor
    kv: KVCachePlan | None = None
    stream: Stream = field(default_factory=list)

    @classmethod
    def of(cls, original: PreTrainedModel, content: torch.Tensor, front: Sequence[int], served: Sequence[int],
           kv: KVCachePlan | None = None) -> Probe:
        """Run the baseline, once for all."""
        with recorded(original) as stream:
            states = torch.cat([last_states(original, row) for row in _behind(tuple(front), content).split(1)])
        return cls(original, content, tuple(front), tuple(served), states, kv, stream)

    @property
    def rows(self) -> torch.Tensor:
        """What the baseline reads, int64 [rows, length]."""
        return _behind(self.front, self.content)

    def kl(self, model: PreTrainedModel, *, as_baseline: bool = False, plain_cache: bool = False) -> torch.Tensor:
        """KL(baseline || model) of every prediction, float64 [rows, positions]; nothing of the front is looked at where
        the two have different ones.

        Args:
            as_baseline: let the model read what the baseline reads. plain_cache: do without the packed cache.
        """
        served = self.front if as_baseline else self.served
        rows, kv = _behind(served, self.content), None if plain_cache else self.kv
        theirs = torch.cat([last_states(model, row, kv) for row in rows.split(1)])
        skipped, theirs = (0, theirs) if served == self.front else (len(self.front), theirs[:, len(served):])
        head, found = OutputHead(model), torch.empty(theirs.shape[:2], dtype=torch.float64)
        for row, given in enumerate(theirs):
            known = self.predicted(row)[skipped:]
            for run in runs_of_positions(head.vocabulary, len(given)):
                q = torch.log_softmax(head.logits(given[run]), dim=-1)
                p = known[run].to(q.device)
                found[row, run] = (p.exp() * (p - q)).sum(-1).double().cpu()
        return found.clamp(min=0)

    def predicted(self, row: int) -> torch.Tensor:
        """log p of the baseline at every position of a row, float32 [length, vocabulary]."""
        return self._kept[row] if self._kept else self._predict(row)

    @functools.cached_property
    def _kept(self) -> list[torch.Tensor]:
        few = self.rows.numel() * int(self.original.get_input_embeddings().weight.shape[0]) <= KEPT_VALUES
        return [self._predict(row) for row in range(len(self.content))] if few else []

    def _predict(self, row: int) -> torch.Tensor:
        return torch.log_softmax(OutputHead(self.original).logits(self.states[row]), dim=-1)

    def loss(self, model: PreTrainedModel, *, as_baseline: bool = False, plain_cache: bool = False) -> float:
        """The mean of `kl`."""
        return float(self.kl(model, as_baseline=as_baseline, plain_cache=plain_cache).mean())


def _behind(front: tuple[int, ...], content: torch.Tensor) -> torch.Tensor:
    before = torch.tensor(front, dtype=torch.long).expand(len(content), -1)
    return torch.cat([before, content], dim=1)
