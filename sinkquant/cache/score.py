"""Logits of whole rows through a packed cache, as decoding would give them."""

from __future__ import annotations

import contextlib

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.chunked import ReadInChunks, chunk_length
from sinkquant.cache.prefix import put_in_front
from sinkquant.cache.prepare import prepare
from sinkquant.cache.whole import WholeRows, reads_whole


def cached_logits(model: PreTrainedModel, ids: torch.Tensor, plan: KVCachePlan) -> torch.Tensor:
    """Logits [rows, length, vocabulary] of ids int64 [rows, length] without padding on the left.

    The plan's `front` is put in front of every row, and has no logits in the result.
    Every row is read as if in chunks through a cache of its own; a plain forward pass would attend to unquantized keys
    and values and measure nothing. Where `reads_whole` says that it gives the same scores, that takes one pass.
    """
    prepare(model)
    ids, _ = put_in_front(ids, None, plan.front)
    if reads_whole(model, plan):
        with contextlib.suppress(ReadInChunks):
            return _logits(model, ids, WholeRows(model.config, plan), ids.shape[1])[:, len(plan.front):]
    return _logits(model, ids, SinkCache(model.config, plan), chunk_length(plan))[:, len(plan.front):]


def _logits(model: PreTrainedModel, ids: torch.Tensor, cache: SinkCache, length: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(chunk, past_key_values=cache, use_cache=True).logits
                          for chunk in ids.split(length, dim=1)], dim=1)
