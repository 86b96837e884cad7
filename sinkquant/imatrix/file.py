"""llama.cpp's GGUF file of an importance matrix, as its `llama-imatrix` writes it and `llama-quantize` reads it, and
what it calls the matrices of a block: the same in every architecture that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.decoder import ROUTER
from sinkquant.schemes.gguf.layout import FileTensor, write_tensors

TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    **{f"mlp.{owner}.{part}_proj": f"ffn_{part}_shexp"
       for owner in ("shared_expert", "shared_experts") for part in ("gate", "up", "down")}}
"""A linear of a block -> its tensor. Files of DeepSeek made since 2025 have two tensors for attn_kv_b."""
EXPERTS = {"up": ("ffn_gate_exps", "ffn_up_exps"), "down": ("ffn_down_exps",)}
"""What an expert's projections read -> the tensors, of all experts of a layer, that read it."""


@dataclass(frozen=True)
class Importance:
    """What one tensor of a model reads.

    Attributes:
        squares: float32 [matrices, columns], the sum of squares of every input channel; one row, or one per expert.
        counts: float32 [matrices], the tokens that it is of. llama.cpp divides by them.
    """

    squares: torch.Tensor
    counts: torch.Tensor


def write_importance(path: Path, found: Mapping[str, Importance], texts: Sequence[str], rows: int, length: int) -> None:
    """Write the file; there is none until it is whole.

    Args:
        found: tensor of a GGUF file -> what it reads. texts: what the calibration text is called.
        rows: of calibration ("chunks"), of `length` tokens.
    """
    metadata = {"general.type": ("str", "imatrix"), "imatrix.datasets": ("[str]", list(texts)),
                "imatrix.chunk_count": ("u32", rows), "imatrix.chunk_size": ("u32", length)}
    values: dict[str, torch.Tensor] = {}
    for name, one in sorted(found.items()):
        values[f"{name}.in_sum2"] = one.squares
        values[f"{name}.counts"] = one.counts[:, None]
    tensors = {name: FileTensor("F32", tuple(one.shape)) for name, one in values.items()}
    aside = path.with_name(f"{path.name}.partial")
    try:
        write_tensors(aside, metadata, tensors, lambda name: [values[name].contiguous().numpy().data])
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def tensor_names(decoder: Decoder) -> dict[str, str]:
    """Linear -> name of its tensor in a GGUF file, for all that llama.cpp quantizes; routers it leaves alone.

    Raises:
        RequestError: llama.cpp has no name for a linear here, or experts cannot be told apart.
    """
    found = {}
    for name in decoder.linears:
        if ROUTER.search(name):
            continue
        index = decoder.block_of(name)
        short = TENSORS.get(name.removeprefix(f"{decoder.block_names[index]}."))
        if short is None:
            raise RequestError(f"llama.cpp's name for {name} of {type(decoder.model).__name__} is not known here, so "
                               "that no importance matrix can be written; use llama-imatrix.")
        found[name] = f"blk.{index}.{short}.weight"
    return found


def expert_names(block: int, role: str) -> list[str]:
    """The tensors of a block's experts that read the same. role: of `ExpertLinear`."""
    return [f"blk.{block}.{short}.weight" for short in EXPERTS[role]]
