"""What llama.cpp calls the architectures of transformers, and their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ENDS = {EMBEDDING: "token_embd", "model.norm": "output_norm", HEAD: "output"}
CODES = {"q4_0": 4, "iq4_nl": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}
"""What follows a module's name where its weight is packed: the kind of block -> bits of a code."""
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FILE_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_SHARED = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
           "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
           "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
_LLAMA = _SHARED | {"post_attention_layernorm": "ffn_norm"}
_NORMED = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA = _SHARED | {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                    "post_feedforward_layernorm": "post_ffw_norm"}
_PHI = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"} | {
    name: short for name, short in _LLAMA.items() if name.rpartition(".")[2] in (
        "o_proj", "down_proj", "input_layernorm", "post_attention_layernorm")}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers as llama.cpp has it.

    Attributes:
        architecture: its name there. blocks: module in a block -> tensor.
        interleaved: rows of queries and keys stand in pairs that are rotated together; transformers has them a half of
            a head apart.
        norms_plus_one: gains of norms are stored with the one that transformers adds while it computes.
        always_tied: there is no output head beside the token embedding.
    """

    architecture: str
    title: str
    blocks: Mapping[str, str]
    interleaved: bool = False
    norms_plus_one: bool = False
    always_tied: bool = False


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", "Llama", _LLAMA, interleaved=True),
    "MistralForCausalLM": Family("llama", "Mistral", _LLAMA, interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2", _LLAMA),
    "Qwen3ForCausalLM": Family("qwen3", "Qwen3", _LLAMA | _NORMED),
    "Gemma2ForCausalLM": Family("gemma2", "Gemma 2", _GEMMA, norms_plus_one=True, always_tied=True),
    "Gemma3ForCausalLM": Family("gemma3", "Gemma 3", _GEMMA | _NORMED, norms_plus_one=True),
    "Phi3ForCausalLM": Family("phi3", "Phi-3", _PHI),
}
"""transformers' class -> what llama.cpp makes of it. `title` is `general.name`. llama.cpp runs a Mistral as a Llama,
and both it and a Phi-3 without their window, where they have one."""


def file_name(family: Family, name: str) -> str | None:
    """The name in a file of a tensor of the model, packed or not; None where GGUF has none."""
    module, _, leaf = name.rpartition(".")
    suffix = "bias" if leaf == "bias" else "weight"
    if module == HEAD and family.always_tied:
        return None
    if module in ENDS:
        return f"{ENDS[module]}.{suffix}"
    found = _BLOCK.fullmatch(module)
    short = family.blocks.get(found[2]) if found else None
    return f"blk.{found[1]}.{short}.{suffix}" if found and short else None


def model_name(family: Family, name: str) -> str | None:
    """The name in the model of a tensor of a file; None where the model has none."""
    stem, _, leaf = name.rpartition(".")
    ends = {short: module for module, short in ENDS.items()}
    if stem in ends:
        return f"{ends[stem]}.{leaf}"
    found = _FILE_BLOCK.fullmatch(stem)
    module = {short: module for module, short in family.blocks.items()}.get(found[2]) if found else None
    return f"model.layers.{found[1]}.{module}.{leaf}" if found and module else None


def is_gain(name: str) -> bool:
    """Whether a tensor of a file is the gain of a norm."""
    return name.endswith("norm.weight")
