"""A quantized weight: integer codes and their scales, on the symmetric grid of compressed-tensors; codes in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from sinkquant.schemes.codecs.outliers import Outliers

CHUNK = 1 << 17
"""Weights that are worked on at a time."""


@dataclass(frozen=True)
class PackedWeight:
    """codes: int8 [rows, columns] in -2^(bits-1) .. 2^(bits-1) - 1, or float8_e4m3fn; scale: 16-bit float
    [rows, groups]; outliers: what stands beside the codes, or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int
    outliers: Outliers | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """code * scale, [rows, columns]: in every dtype what compressed-tensors gives for a model of that dtype.

        The product of an 8-bit code and a 16-bit scale is exact in float32, so that one rounding remains.
        """
        dense, spread = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device), self.spread()
        for rows in row_chunks(self.codes):
            part = dequantize(self.codes[rows], spread[rows])
            dense[rows] = part if self.outliers is None else self.outliers.add_to(part, rows.start)
        return dense

    def spread(self) -> torch.Tensor:
        """What codes are multiplied with, [rows, groups]."""
        return self.scale

    def split(self, rows: Sequence[int]) -> list[Self]:
        """Weights of so many rows each, one below the other in this one, of which nothing stands beside the codes."""
        assert self.outliers is None
        return [replace(self, codes=codes, scale=scale) for codes, scale in zip(
            self.codes.split(list(rows)), self.scale.split(list(rows)), strict=True)]

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device),
                       outliers=None if self.outliers is None else self.outliers.to(device))


def group_scales(weight: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales that reach the largest |weight| of every group, rounded to the 16-bit `dtype` that stores them.

    Args:
        weight: float [rows, columns]; group_size divides columns, or is -1 for one group per row.

    Returns:
        [rows, groups] in `dtype`, never zero, and never so large that a code times it overflows `dtype`.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, columns if group_size == -1 else group_size).float()
    args = QuantizationArgs(num_bits=bits, symmetric=True)
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    return scales.clamp(smallest(dtype), torch.finfo(dtype).max / 2 ** (bits - 1)).to(dtype)


def smallest(dtype: torch.dtype) -> float:
    """The smallest scale in a 16-bit `dtype`, a normal number in float32. tiny * eps is the smallest subnormal number:
    float16 needs them for weights under 0.008."""
    info = torch.finfo(dtype)
    return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)


def to_codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the nearest code, int8 [rows, columns]. scale: [rows, groups]."""
    grouped = weight.float().reshape(*scale.shape, -1) / scale.float()[..., None]
    codes = grouped.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8).reshape(weight.shape)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code * scale in float32, [rows, columns]."""
    return (codes.reshape(*scale.shape, -1).float() * scale.float()[..., None]).reshape(codes.shape)


def row_chunks(weight: torch.Tensor, values: int = CHUNK) -> list[slice]:
    """Slices of rows of so many values, by default few enough for what is computed from them to stay in a processor's
    cache."""
    rows, columns = weight.shape
    step = max(1, values // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack_to_int32` of compressed-tensors gives, int32 [rows, words], several times as fast where a word holds
    whole codes. codes: int8 [rows, columns]."""
    rows, columns = codes.shape
    if bits not in (2, 4, 8) or columns % 16:
        return torch.cat([pack_to_int32(codes[part], bits) for part in row_chunks(codes)])
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    short = {2: torch.int16, 4: torch.int32, 8: torch.int64}[bits]
    for part in row_chunks(codes):
        eight = (codes[part].contiguous().view(torch.uint8) + 2 ** (bits - 1)).view(torch.int64)
        field, used = 8, bits
        while used < field < 64:  # close the gap between two fields: they become one of twice the width
            kept = sum(((1 << 2 * used) - 1) << start for start in range(0, 64, 2 * field))
            eight = (eight | eight >> (field - used)) & kept
            field, used = 2 * field, 2 * used
        words[part] = eight.view(short)[:, ::64 // (8 * bits)].contiguous().view(torch.int32)
    return words


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes, int8 [rows, columns]. words: int32 [rows, ceil(columns * bits / 32)].

    What `unpack_from_int32` of compressed-tensors gives, several times as fast where a byte holds whole codes.
    """
    if bits not in (2, 4, 8):
        return unpack_from_int32(words, bits, torch.Size((len(words), columns)))
    octets = words.contiguous().view(torch.uint8)
    per = 8 // bits
    codes = torch.empty(*octets.shape, per, dtype=torch.uint8, device=words.device)
    for place in range(per):
        torch.bitwise_right_shift(octets, place * bits, out=codes[..., place])
    codes &= 2**bits - 1
    codes -= 2 ** (bits - 1)
    return codes.view(torch.int8).flatten(1)[:, :columns]
