"""A tiny random model of every architecture family that sinkquant names, from configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = _COMMON | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"head_dim": 16, "sliding_window": 48},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 16},
    "gemma2": _LLAMA | {"head_dim": 16, "sliding_window": 48, "query_pre_attn_scalar": 16},
    "gemma3_text": _LLAMA | {"head_dim": 16, "sliding_window": 48, "query_pre_attn_scalar": 16,
                             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _LLAMA,
    "gpt2": _COMMON | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": _COMMON | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                           "num_attention_heads": 4, "max_position_embeddings": 256},
    "opt": _COMMON | {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "max_position_embeddings": 256, "word_embed_proj_dim": 64},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": _LLAMA | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48,
                         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}

_EXPERTS = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": FAMILIES["mixtral"] | _EXPERTS | {"num_local_experts": 16, "intermediate_size": 32},
    "qwen3_moe": FAMILIES["qwen3_moe"] | _EXPERTS | {"num_experts": 16},
    "qwen2_moe": _LLAMA | _EXPERTS | {"num_experts": 16, "shared_expert_intermediate_size": 64},
    "olmoe": _LLAMA | _EXPERTS | {"num_experts": 16, "intermediate_size": 32},
    "deepseek_v3": _LLAMA | _EXPERTS | {
        "n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16},
}
"""Mixtures of 16 experts: with shared experts, and with a first layer that has none, too."""


TUPLES: dict[str, dict[str, Any]] = {
    "falcon_h1": _LLAMA | {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
                           "mamba_d_state": 16, "mamba_n_groups": 1}}
"""Blocks that give a tuple."""
COPIES: dict[str, dict[str, Any]] = {
    "jetmoe": _LLAMA | {"kv_channels": 16, "num_experts_per_tok": 2, "num_local_experts": 4}}
"""Attention reads copies of the heads that are cached."""


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of the family, deterministic by seed, in evaluation mode."""
    return _random(family, (FAMILIES | TUPLES | COPIES)[family] | overrides, seed, dtype)


def tiny_mixture(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random mixture of 16 experts, deterministic by seed, in evaluation mode."""
    return _random(family, MIXTURES[family] | overrides, seed, dtype)


def _random(family: str, settings: dict[str, Any], seed: int, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
