"""The ruler: the KL of a model from the baseline on a few rows, as served and with anything put right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan
from sinkquant.evaluate import token_figures
from sinkquant.evaluate.states import last_states
from sinkquant.models.head import OutputHead


@dataclass(frozen=True)
class Probe:
    """Rows of content tokens, which every model reads behind tokens of its own.

    Attributes:
        original: the baseline. content: int64 [rows, length], without what a tokenizer puts in front.
        front, served: what the baseline's tokenizer puts in front, and the checkpoint's.
        states: the baseline's, of every row. kv: the packed cache that the checkpoint is read through.
    """

    original: PreTrainedModel
    content: torch.Tensor
    front: tuple[int, ...]
    served: tuple[int, ...]
    states: torch.Tensor
    kv: KVCachePlan | None = None

    @classmethod
    def of(cls, original: PreTrainedModel, content: torch.Tensor, front: Sequence[int], served: Sequence[int],
           kv: KVCachePlan | None = None) -> Probe:
        """Run the baseline, once for all."""
        states = torch.cat([last_states(original, row) for row in _behind(tuple(front), content).split(1)])
        return cls(original, content, tuple(front), tuple(served), states, kv)

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
        mine, read = self.states, self.rows
        if served != self.front:
            mine, theirs, read = mine[:, len(self.front):], theirs[:, len(served):], self.content
        heads = [OutputHead(self.original), OutputHead(model)]
        return token_figures(heads, [mine, theirs], read)[0].kl.clamp(min=0)

    def loss(self, model: PreTrainedModel, *, as_baseline: bool = False, plain_cache: bool = False) -> float:
        """The mean of `kl`."""
        return float(self.kl(model, as_baseline=as_baseline, plain_cache=plain_cache).mean())


def _behind(front: tuple[int, ...], content: torch.Tensor) -> torch.Tensor:
    before = torch.tensor(front, dtype=torch.long).expand(len(content), -1)
    return torch.cat([before, content], dim=1)
