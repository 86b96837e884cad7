"""lm-eval through the packed KV cache: log-likelihood, rolling perplexity and generation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import SinkCache, prepare, put_in_front
from sinkquant.evaluate.harness import SinkLM
from sinkquant.evaluate.states import last_states


class CachedSinkLM(SinkLM):
    """SinkLM whose every score is read through a SinkCache; see `SinkLM` for the other arguments.

    Rows are padded on the right, where no scored token sees the padding. What the plan puts in front of every row is
    neither scored nor part of what is generated; windows are shorter by as many tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: bool, batch_size: int,
                 plan: KVCachePlan, quiet: bool = True, window: int | None = None) -> None:
        self._plan = plan
        super().__init__(model, tokenizer, bos, batch_size, quiet, window)
        prepare(model)

    @property
    def max_length(self) -> int:
        """Tokens of a row that the model has positions for, beside those in front."""
        return int(super().max_length) - len(self._plan.front)

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        return last_states(self.model, ids, self._plan)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        cache = SinkCache(self.model.config, self._plan)
        ids, mask = put_in_front(context, kwargs.pop("attention_mask", None), self._plan.front)
        front = len(self._plan.front)
        made = super()._model_generate(ids, max_length + front, stop, past_key_values=cache, attention_mask=mask,
                                       **kwargs)
        return torch.cat([context, made[:, ids.shape[1]:]], dim=1)
