"""Codes <-> int32 words, as compressed-tensors packs them."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from sinkquant.schemes.codecs.packed import row_chunks


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
