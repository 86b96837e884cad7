"""A model's configuration cut down to a size that is built and run in a blink: the same class, the same kinds of
layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from sinkquant.models.shorter import INDICES, LEADING, OF_FOLDER, told_of

VOCABULARY, POSITIONS, WINDOW, EXPERTS = 64, 64, 16, 4
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "q_lora_rank",
          "kv_lora_rank", "moe_intermediate_size", "expert_ffn_hidden_size", "lora_rank")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HEAD_SIZES = ("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_channels",
              "linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar", "attention_head_dim")
INNER = re.compile(r"(^|_)(intermediate_size(_mlp)?|ffn_dim|n_inner|ffn_hidden_size|d_ff|mlp_dim|ffn_size)$")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_k", "moe_topk")
ONE = ("n_group", "topk_group", "mamba_n_groups")
TOKENS = re.compile(r"_token_(id|index)s?$")


def shrunk(config: PreTrainedConfig, layers: Sequence[int], unit: int) -> PreTrainedConfig:
    """A copy of a model's configuration with a few of its layers, and widths of `unit`.

    Sizes are set by the names that transformers' configurations share; what a configuration calls otherwise stays.

    Args:
        layers: indices of the layers that it keeps, ascending.
        unit: width of the residual stream; a multiple of 64 whatever else it has to be a multiple of.

    Raises:
        Exception: whatever its class says of numbers that it does not take.
    """
    settings = config.to_dict()
    text = config.get_text_config(decoder=True)
    inside = next((key for key, value in vars(config).items() if value is text), "")
    small = _smaller(settings, layers, unit, inside)
    return type(config)(**{key: value for key, value in small.items() if key not in OF_FOLDER})


def _smaller(settings: dict[str, Any], layers: Sequence[int], unit: int, inside: str = "") -> dict[str, Any]:
    """`inside`: the key of the decoder's own configuration, where it has one; towers keep one layer."""
    found = dict(settings)
    count = next((int(settings[key]) for key in COUNTS if isinstance(settings.get(key), int)), 0)
    heads = next((settings[key] for key in HEADS if isinstance(settings.get(key), int)), 4)
    shared = any(isinstance(settings.get(key), int) and settings[key] != heads for key in KV_HEADS)
    for key, value in settings.items():
        if key in (*INDICES, *LEADING, "per_layer_config"):
            found[key] = told_of(key, value, layers)
        elif isinstance(value, list) and value and len(value) == count:
            found[key] = [value[index] for index in layers]
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            found[key] = _plain_rope(value, unit)
        elif key.endswith("_config") and isinstance(value, dict) and key != "quantization_config":
            found[key] = _smaller(value, layers if key == inside else (0,), unit)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[key] = _number(key, value, len(layers), unit, shared)
        elif TOKENS.search(key) and isinstance(value, list):
            found[key] = [1]
    return found


def _number(key: str, value: int, layers: int, unit: int, shared: bool) -> int:
    if key in COUNTS:
        return layers
    if key in WIDTHS:
        return unit
    if INNER.search(key):
        return 2 * unit
    if key in HEADS or key == "linear_num_value_heads":
        return 4
    if key in KV_HEADS or key == "linear_num_key_heads":
        return 2 if shared or key == "linear_num_key_heads" else 4
    if key in HEAD_SIZES:
        return unit // 4
    if key in EXPERT_COUNTS:
        return EXPERTS
    if key in CHOSEN:
        return min(value, 2)
    if key in ONE:
        return 1
    if key in ("vocab_size", "vocab_size_per_layer_input"):
        return VOCABULARY
    if key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"):
        return POSITIONS
    if key in ("sliding_window", "attention_window_size"):
        return WINDOW
    if key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        return 0
    return 1 if TOKENS.search(key) else value


def _plain_rope(value: dict[str, Any], unit: int) -> dict[str, Any]:
    """Rotary embeddings without the factors that are as long as a head is wide, sections cut to its new width."""
    if value and all(isinstance(inner, dict) for inner in value.values()):
        return {key: _plain_rope(inner, unit) for key, inner in value.items()}
    sections = value.get("mrope_section")
    if isinstance(sections, list) and sections:  # of half a head: of time, height and width
        value = value | {"mrope_section": _sections(len(sections), unit // 8)}
    if not any(isinstance(inner, list) for key, inner in value.items() if key != "mrope_section"):
        return value
    kept = {key: value[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section") if key in value}
    return {"rope_type": "default"} | kept


def _sections(count: int, total: int) -> list[int]:
    """So many parts of a whole, as even as can be."""
    return [total // count + (index < total % count) for index in range(count)]
