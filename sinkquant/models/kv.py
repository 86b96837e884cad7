"""What every layer of a decoder keeps in a KV cache, read off its configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from sinkquant.artifacts import KVLayerShape

FULL, SLIDING = ("full_attention",), ("sliding_attention", "reference_sliding_attention")


def kv_layers(config: PreTrainedConfig) -> list[KVLayerShape]:
    """One entry per layer; `heads` is 0 for layers that keep no plain keys and values (linear attention, shared or
    compressed caches, chunked attention)."""
    config = config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(config)
    found = []
    for kind, kwargs, layer in zip(kinds, arguments, config.per_layer_config, strict=True):
        heads, key_dim, value_dim = _heads(layer)
        if kind not in FULL + SLIDING:
            heads = 0
        found.append(KVLayerShape(heads=heads, key_dim=key_dim, value_dim=value_dim,
                                  sliding_window=kwargs.get("sliding_window")))
    return found


def _heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(kv heads, channels of a key, channels of a value)."""
    queries = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        # Multi-head latent attention is cached as plain heads, keys wider than values.
        return queries, int(config.qk_nope_head_dim + config.qk_rope_head_dim), int(config.v_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or (
        1 if getattr(config, "multi_query", False) else getattr(config, "num_kv_heads", None)) or queries
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    return int(heads), dim, dim
