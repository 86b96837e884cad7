"""Which modules of a model are its decoder blocks, which of these have an attention matrix, and what each keeps in a KV
cache.

Hybrids have blocks of several kinds: attention beside state-space mixers (Mamba), linear attention or convolutions.
Vision-language models hold towers with lists of blocks of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from sinkquant.artifacts import KVLayerShape
from sinkquant.errors import RequestError

FULL, SLIDING = ("full_attention",), ("sliding_attention", "reference_sliding_attention")
MIXER_REASON = "part of a state-space mixer or a convolution, which has no attention matrix: left alone"
STATE_SPACE = ("A_log", "dt_bias")
"""Parameters that only state-space mixers and linear attention have."""


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's decoder blocks, and its module name.

    Raises:
        RequestError: there is no such list, there are several, or its blocks share weights.
    """
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == layers
             and any(attention_of(block) for block in module)]
    if len(found) > 1:  # a tower may be as deep as the decoder
        parts = tuple(f"{name}." for name, module in model.named_modules()
                      if isinstance(module, PreTrainedModel) and module.config is text and name)
        found = [one for one in found if one[0].startswith(parts)] if parts else found
    if len(found) != 1:
        raise RequestError(f"{type(model).__name__} is not supported: it does not hold one list of {layers} decoder "
                           "blocks with attention.")
    name, blocks = found[0]
    seen: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters():
            if seen.setdefault(id(parameter), index) != index:
                raise RequestError(f"{type(model).__name__} is not supported: its layers {seen[id(parameter)]} and "
                                   f"{index} share the weight {path}.")
    return name, blocks


def attention_of(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a block, known by their classes' names."""
    return [module for module in block.modules() if "attention" in type(module).__name__.lower()]


def layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """What a decoder's configuration says of one of its layers, which may differ in heads and their width."""
    found: PreTrainedConfig = config.per_layer_config[index]
    return found


def heads_by_layer(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Query heads and key-value heads of every layer of a decoder; zeros where its configuration names none."""
    return [(heads := int(getattr(layer, "num_attention_heads", None) or 0),
             int(getattr(layer, "num_key_value_heads", None) or heads)) for layer in config.per_layer_config]


def same_heads(one: PreTrainedConfig, other: PreTrainedConfig, kept: Sequence[int] | None = None) -> bool:
    """Whether two models have as many layers, with the same numbers of heads.

    Args:
        kept: the layers of the first that the second has, where some were dropped.
    """
    before, after = (heads_by_layer(config.get_text_config(decoder=True)) for config in (one, other))
    return [heads for place, heads in enumerate(before) if kept is None or place in kept] == after


def without_attention(config: PreTrainedConfig, index: int, block: nn.Module) -> str | None:
    """Why a block has no attention matrix, in words; None where it has one.

    Args:
        config: of the decoder.
    """
    kinds = getattr(config, "layer_types", None) or ()
    kind = str(kinds[index]) if index < len(kinds) else ""
    if attention_of(block) and not kind.startswith("linear"):
        return None
    return f"its layer{f', {kind},' if kind else ''} has no attention matrix: left alone"


def mixers_of(name: str, block: nn.Module) -> list[str]:
    """Names of the modules of a block that mix tokens in another way than by attention."""
    return [f"{name}.{path}" for path, module in block.named_modules() if path and (
        any(isinstance(child, nn.Conv1d) for child in module.children())
        or any(leaf in STATE_SPACE for leaf, _ in module.named_parameters(recurse=False)))]


def kv_layers(config: PreTrainedConfig) -> list[KVLayerShape]:
    """One entry per layer; `heads` is 0 for layers that keep no plain keys and values (linear attention, shared or
    compressed caches, chunked attention)."""
    config = config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(config)
    found = []
    for kind, kwargs, layer in zip(kinds, arguments, config.per_layer_config, strict=True):
        heads, key_dim, value_dim = _heads(layer)
        # Multi-head latent attention caches what keys and values are made of.
        latent = int(layer.kv_lora_rank + layer.qk_rope_head_dim) if getattr(layer, "kv_lora_rank", None) else 0
        if kind not in FULL + SLIDING or latent:
            heads = 0
        found.append(KVLayerShape(heads=heads, key_dim=key_dim, value_dim=value_dim, latent=latent,
                                  sliding_window=kwargs.get("sliding_window")))
    return found


def _heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(kv heads, channels of a key, channels of a value)."""
    queries = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        return queries, int(config.qk_nope_head_dim + config.qk_rope_head_dim), int(config.v_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or (
        1 if getattr(config, "multi_query", False) else getattr(config, "num_kv_heads", None)) or queries
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    return int(heads), dim, int(getattr(config, "v_head_dim", None) or dim)
