"""A model's last hidden states of whole rows, from which logits are taken where they are needed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import cached_logits
from sinkquant.models.head import headless


def last_states(model: PreTrainedModel, ids: torch.Tensor, kv: KVCachePlan | None = None) -> torch.Tensor:
    """What the output head is given, [rows, length, hidden_size] in the model's dtype.

    Args:
        ids: int64 [rows, length], without padding on the left.
        kv: run the model through a KV cache that is packed so; null for none.
    """
    ids = ids.to(model.device)
    if kv is not None and kv.evict is not None and len(ids) > 1:  # each keeps sinks of its own of what is dropped
        return torch.cat([last_states(model, row, kv) for row in ids.split(1)])
    with torch.no_grad(), headless(model) as seen:
        if kv is None:
            model(ids, use_cache=False)
            return seen[0]
        cached_logits(model, ids, kv)
        return torch.cat(seen, dim=1)[:, len(kv.front):]
