"""The tensors of GPTQ's format: unsigned codes and zeros in int32 words, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.packed import PackedWeight

Leaves = dict[str, torch.Tensor]
WORD = 32


def to_leaves(weight: PackedWeight) -> Leaves:
    """qweight int32 [columns * bits / 32, rows], qzeros int32 [groups, rows * bits / 32], scales float16
    [groups, rows], g_idx int32 [columns]. Zeros are stored less one, as the format's first version does
    (gptqmodel: "gptq")."""
    rows, columns = weight.codes.shape
    groups = weight.scale.shape[1]
    middle = 2 ** (weight.bits - 1)
    codes = (weight.codes.to(torch.int32) + middle).T.contiguous()
    zeros = torch.full((rows, groups), middle - 1, dtype=torch.int32)
    return {"qweight": _pack(codes, weight.bits), "qzeros": _pack(zeros, weight.bits).T.contiguous(),
            "scales": weight.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups)}


@dataclass(frozen=True)
class GPTQWords:
    """Reads any tensors of the format: zeros of any value, columns in any order of groups."""

    bits: int

    def decode(self, leaves: Leaves, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """(code - zero) * scale, [rows, columns] in `dtype`."""
        rows, columns = shape
        codes = _unpack(leaves["qweight"], self.bits, columns)
        zeros = _unpack(leaves["qzeros"].T, self.bits, rows).T + 1
        group = leaves["g_idx"].long()
        scales = leaves["scales"].float()
        return ((codes - zeros[group]).float() * scales[group]).T.to(dtype).contiguous()


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [values, others] in 0 .. 2^bits - 1, 32 divides values -> int32 [values * bits / 32, others], low bits
    first; a code may cross from one word into the next."""
    values, others = codes.shape
    spread = (codes[:, None] >> torch.arange(bits, dtype=torch.int32)[:, None]) & 1
    lines = spread.reshape(values * bits // WORD, WORD, others).to(torch.int64)
    words = (lines << torch.arange(WORD, dtype=torch.int64)[:, None]).sum(1)
    return torch.where(words >= 2 ** 31, words - 2 ** 32, words).to(torch.int32)


def _unpack(words: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """What `_pack` was given, int32 [values, others]."""
    others = words.shape[1]
    lines = (words[:, None].to(torch.int64) >> torch.arange(WORD, dtype=torch.int64)[:, None]) & 1
    spread = lines.reshape(values, bits, others)
    return (spread << torch.arange(bits, dtype=torch.int64)[:, None]).sum(1).to(torch.int32)
