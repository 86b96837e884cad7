"""lm-eval through the packed KV cache: log-likelihood, rolling perplexity and generation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import SinkCache, cached_logits, prepare
from sinkquant.evaluate.harness import SinkLM


class CachedSinkLM(SinkLM):
    """SinkLM whose every score is read through a SinkCache; see `SinkLM` for the other arguments.

    Rows are padded on the right, where no scored token sees the padding.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: bool, batch_size: int,
                 plan: KVCachePlan, quiet: bool = True) -> None:
        super().__init__(model, tokenizer, bos, batch_size, quiet)
        self._plan = plan
        prepare(model)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        return cached_logits(self.model, inps, self._plan)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        cache = SinkCache(self.model.config, self._plan)
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)
