"""The bytes of ggml's blocks of 32: float16 numbers in front, then the fifth bits of codes that have one, then the
codes: a byte each, or two halves to a byte, the first 16 columns in the low ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

HALF = 16
BLOCK = 2 * HALF


def to_blocks(codes: torch.Tensor, bits: int, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [rows, bytes of a row].

    Args:
        codes: uint8 [rows, columns], from 0 on. numbers: float16 [rows, groups], in the order of a block; those of a
            group of several blocks stand in each of them.
    """
    rows, columns = codes.shape
    octets, blocks = codes.reshape(rows, -1, BLOCK), columns // BLOCK
    parts = [one.repeat_interleave(blocks // one.shape[1], dim=1).contiguous().view(torch.uint8).reshape(
        rows, blocks, 2) for one in numbers]
    if bits == 5:
        fifth = (octets >> 4).reshape(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        parts.append(fifth.sum(-1, dtype=torch.uint8))
    if bits < 8:
        octets = octets & 15
        octets = octets[..., :HALF] | octets[..., HALF:] << 4
    return torch.cat([*parts, octets], dim=2).reshape(rows, -1)


def from_blocks(packed: torch.Tensor, bits: int, numbers: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes, uint8 [rows, blocks, 32], and so many float16 numbers, each [rows, blocks, 1].

    Args:
        packed: uint8 [rows, blocks, bytes of a block].
    """
    found = [packed[..., 2 * place:2 * place + 2].contiguous().view(torch.float16) for place in range(numbers)]
    octets = packed[..., 2 * numbers:]
    if bits == 8:
        return octets, found
    low = octets[..., -HALF:]
    codes = torch.cat([low & 15, low >> 4], dim=2)
    if bits == 5:
        fifth = octets[..., :4, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes = codes | fifth.flatten(2) << 4
    return codes, found
