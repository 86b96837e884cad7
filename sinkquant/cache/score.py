"""Logits of whole rows through a packed cache, as decoding would give them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.prefix import put_in_front
from sinkquant.cache.prepare import prepare


def chunk_length(plan: KVCachePlan) -> int:
    """Tokens per forward pass: no more than the window, so that nothing is seen exactly that decoding would have seen
    packed, and one block at most, so that a plan and its control with a longer window are read alike."""
    return max(1, min(plan.group_size, plan.window))


def cached_logits(model: PreTrainedModel, ids: torch.Tensor, plan: KVCachePlan) -> torch.Tensor:
    """Logits [rows, length, vocabulary] of ids int64 [rows, length] without padding on the left.

    The plan's `front` is put in front of every row, and has no logits in the result.
    Every row is read in chunks through a SinkCache of its own making; a single forward pass would attend to
    unquantized keys and values and measure nothing.
    """
    prepare(model)
    cache = SinkCache(model.config, plan)
    ids, _ = put_in_front(ids, None, plan.front)
    with torch.no_grad():
        return torch.cat([model(chunk, past_key_values=cache, use_cache=True).logits
                          for chunk in ids.split(chunk_length(plan), dim=1)], dim=1)[:, len(plan.front):]
