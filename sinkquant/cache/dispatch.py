"""Sends reads of packed layers to `attend`, and everything else to the attention that the model had before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sinkquant.cache.attention import PackedRead, attend, with_slots
from sinkquant.cache.chunked import ChunkedRead
from sinkquant.cache.stand_in import read_of
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.attention import keys_picked

PREFIX = "sinkquant_packed_"
OVER = ("sdpa", "eager")
"""Attention whose masks are per column, so that packed columns can be masked too."""


def reads_packed(model: PreTrainedModel) -> bool:
    """Whether the attention of a model can be given a packed layer."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(PREFIX)


def dispatch_packed(model: PreTrainedModel) -> None:
    """Put the packed attention in front of a model's own. Left as they are, and read dense copies: models with other
    attention than sdpa or eager, and those whose queries pick their keys, which they mask under these names alone."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    if any(keys_picked(module) is not None for module in model.modules()):
        return
    own_eager = all(hasattr(sys.modules[type(block).__module__], "eager_attention_forward")
                    for block in Decoder.of(model).blocks)
    if before not in OVER or (before == "eager" and not own_eager):
        return
    name, mask = PREFIX + before, AttentionMaskInterface()[before]
    if before == "sdpa" and getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        name, mask = f"{name}_shared", _always_masked
    AttentionInterface.register(name, _over_sdpa if before == "sdpa" else _over_eager)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)


def _always_masked(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """A mask of causal passes too, for which sdpa needs none: Gemma 4 gives layers that share keys and values the last
    queries alone, and looks for a missing mask under the name sdpa alone."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


def _over_sdpa(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    read = read_of(key, value)
    if read is None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return _read(read, AttentionInterface()["sdpa"], module, query, attention_mask, **kwargs)


def _over_eager(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    read = read_of(key, value)
    # Every architecture brings an eager attention of its own in its module.
    own = sys.modules[type(module).__module__].eager_attention_forward
    if read is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    return _read(read, own, module, query, attention_mask, **kwargs)


def _read(read: PackedRead | ChunkedRead, own: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
          module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None,
          **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A packed layer as it is, or its dense copy through the model's own attention; with the exact tokens that a
    sliding window hides in front. Rows that are read in chunks see to it themselves."""
    if isinstance(read, ChunkedRead):
        return read.attend(own, module, query, mask, **kwargs)
    if read.copies is not None:  # what was looked at before is read again
        return own(module, query, *read.copies, mask, **kwargs)
    layer, new = read.layer, query.shape[2]
    seen = layer.seen_in_slots(new) if layer.sees_sinks else None
    slots = seen is not None and bool(seen.any())
    if seen is not None and slots:
        mask = with_slots(mask, seen, layer.get_seq_length() - layer.dropped)
    if layer.worth_reading_packed(new):
        return _packed(read, query, mask, slots=slots, **kwargs)
    keys, values = layer.dense()
    if slots:
        keys = torch.cat([layer.exact_keys, keys], dim=2)
        values = torch.cat([layer.exact_values, values], dim=2)
    out = own(module, query, keys, values, mask, **kwargs)
    read.settle()
    return out


def _packed(read: PackedRead, query: torch.Tensor, mask: torch.Tensor | None, *, slots: bool,
            scaling: float | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
            position_bias: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, None]:
    if position_bias is not None:
        raise RequestError("this model adds a position bias to its attention, which a packed KV cache does not read; "
                           "leave sinkquant.cache.prepare out, or kv_cache.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(read.layer, query, mask, scale, softcap, s_aux, slots)
    read.settle()
    return out, None
