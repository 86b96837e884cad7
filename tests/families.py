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
    "qwen3_moe": _LLAMA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": _LLAMA | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48,
                         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of the family, deterministic by seed, in evaluation mode."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
