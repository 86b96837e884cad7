"""Small GGUF files of tiny Llamas, written by the gguf package as llama.cpp's own converter lays them out."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from families import tiny_model
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tiny_tokenizer import DELIMITERS
from transformers import PreTrainedModel

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOKENS = ["<unk>", "<s>", "</s>", "\u2581", *DELIMITERS, *"w0123456789"]
TOKENS += [f"<filler {index}>" for index in range(128 - len(TOKENS))]
"""The words of `tiny_tokenizer`, letter by letter."""


def write_gguf(path: Path, kind: str = "F32", architecture: str = "llama",
               model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A tiny Llama as a GGUF file, its matrices stored as `kind`; returns the model that was written."""
    model = model or tiny_model("llama")
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(-index) for index in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        key, values = _named(name), tensor.float().numpy()
        if "attn_q" in key or "attn_k" in key:  # rotary halves lie side by side in a GGUF
            heads = config.num_attention_heads if "attn_q" in key else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        _add(writer, key, numpy.ascontiguousarray(values), kind if values.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _named(name: str) -> str:
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}
    if name in ends:
        return ends[name]
    block, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _add(writer: GGUFWriter, key: str, values: numpy.ndarray, kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(key, values)
    elif kind == "F16":
        writer.add_tensor(key, values.astype(numpy.float16))
    elif kind == "BF16":
        bits = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
        writer.add_tensor(key, bits.view(numpy.uint8), raw_dtype=GGMLQuantizationType.BF16)
    else:
        number = GGMLQuantizationType[kind]
        writer.add_tensor(key, quantize(values, number), raw_dtype=number)
