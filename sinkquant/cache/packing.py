"""Codes of 1, 2, 3, 4 or 8 bits <-> dense bytes: no bit is left unused, so bytes held are bits / 8 to the byte.

A block of G tokens is packed along time: byte j of a plane holds the tokens j, j + G/per, j + 2G/per, ..., so that
unpacking writes contiguous runs. Three bits are a plane of two and a plane of one.
"""

from __future__ import annotations

import torch

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits per code -> width in bits of each plane, lowest bits first."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., G, D] below 2**bits into uint8 [..., G * bits / 8, D]. G is a multiple of 8."""
    planes = []
    shift = 0
    for width in PLANES[bits]:
        part = (codes >> shift) & ((1 << width) - 1)
        runs = part.unflatten(-2, (8 // width, -1)).unbind(-3)
        plane = runs[0].clone()
        for index, run in enumerate(runs[1:], start=1):
            plane |= run << (width * index)
        planes.append(plane)
        shift += width
    return torch.cat(planes, dim=-2)


def unpack(packed: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """The inverse of `pack`: codes [..., G, D] as numbers of `dtype`."""
    *outer, rows, width = packed.shape
    codes = torch.empty(*outer, rows * 8 // bits, width, dtype=dtype, device=packed.device)
    start = shift = 0
    for bit_width in PLANES[bits]:
        size = codes.shape[-2] * bit_width // 8
        plane, mask = packed[..., start:start + size, :], (1 << bit_width) - 1
        runs = codes.unflatten(-2, (8 // bit_width, size))
        for index in range(8 // bit_width):
            part = plane >> (bit_width * index) if index else plane
            part = part & mask if index < 8 // bit_width - 1 else part
            if shift:
                runs[..., index, :, :].add_(part << shift)
            else:
                runs[..., index, :, :] = part
        start, shift = start + size, shift + bit_width
    return codes
