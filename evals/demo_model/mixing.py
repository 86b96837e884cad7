"""The mixing cost: a price on attention that is not on the first token.

Sinks form by themselves when a model is large, trained long and sees `<bos>` first in every row (Gu et al.
2410.10781; Barbero et al. 2504.02732). A small model trained for minutes is helped along: every head pays
`c * (1 - attention on the first token)`, so that a head whose attention earns less than it costs goes to the sink.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FIRST_QUERY = 8
CHUNK = 128


def attention_on_first(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax probability of position 0 for every query, [batch, heads, length].

    exp(q k_0 - logsumexp_j(q k_j)), some queries at a time, so that the graph holds no more than a chunk's logits at
    once beside what autograd keeps. query, key: [batch, heads, length, head_dim].
    """
    length = query.shape[2]
    parts = []
    for start in range(0, length, CHUNK):
        logits = (query[:, :, start:start + CHUNK] @ key.mT).float() * scale
        rows = torch.arange(start, start + logits.shape[2], device=query.device)
        hidden = torch.arange(length, device=query.device)[None] > rows[:, None]
        parts.append((logits[..., 0] - logits.masked_fill(hidden, float("-inf")).logsumexp(-1)).exp())
    return torch.cat(parts, dim=2)


@contextlib.contextmanager
def mixing_cost(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """While open, every forward pass appends one scalar per layer >= 1: the mean over heads and queries >= 8 of
    1 - attention on the first token. The caller empties the list before each pass."""
    costs: list[torch.Tensor] = []

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None,
               **kwargs: Any) -> tuple[torch.Tensor, None]:
        if module.layer_idx != 0:
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            keys = repeat_kv(key, query.shape[1] // key.shape[1])
            costs.append(1 - attention_on_first(query, keys, scale)[:, :, FIRST_QUERY:].mean())
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None

    AttentionInterface.register("mixing_cost", attend)
    AttentionMaskInterface.register("mixing_cost", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("mixing_cost")
    try:
        yield costs
    finally:
        model.set_attn_implementation(before)
