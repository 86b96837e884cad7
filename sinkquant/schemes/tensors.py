"""What a safetensors file takes for tensors of known names, dtypes and shapes, to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

DTYPES = {"int64": ("I64", 8), "float64": ("F64", 8), "float32": ("F32", 4), "int32": ("I32", 4),
          "bfloat16": ("BF16", 2), "float16": ("F16", 2), "int16": ("I16", 2), "float8_e4m3fn": ("F8_E4M3", 1),
          "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1)}
"""torch's name of a dtype -> its name in safetensors and its bytes, in the order in which safetensors writes them."""

FILE_BYTES = 5 * 10**9
"""A checkpoint with more bytes of tensors is written as several files."""

Tensor = tuple[str, list[int]]
"""dtype and shape."""


def scale_dtype(dtype: str) -> str:
    """Scales take 16 bits: float16 in a float16 model, bfloat16 in any other."""
    return "float16" if dtype == "float16" else "bfloat16"


def expert_scale_dtype(dtype: str) -> str:
    """Scales of experts have the model's own dtype: transformers makes the experts that it unpacks as wide as their
    scales, and does not cast them to the dtype of the rest."""
    return "float32" if dtype == "float32" else scale_dtype(dtype)


def tensor_bytes(dtype: str, size: list[int]) -> int:
    """Bytes of one tensor."""
    return DTYPES[dtype][1] * math.prod(size)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor_bytes(*tensor) for tensor in tensors)


def checkpoint_files(tensors: dict[str, Tensor], limit: int = FILE_BYTES) -> list[dict[str, Tensor]]:
    """Which tensors go into which safetensors file: in order, a new one where `limit` bytes would be passed."""
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(*tensor)
        if files[-1] and filled + size > limit:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += size
    return files


def file_header(tensors: dict[str, Tensor]) -> bytes:
    """What stands before the data of a safetensors file: the length of its JSON, and the JSON with the place of every
    tensor. safetensors writes tensors by dtype, then by name, and pads the JSON to eight bytes."""
    rank = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (rank.index(item[1][0]), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, size) in ordered:
        end = offset + tensor_bytes(dtype, size)
        header[name] = {"dtype": DTYPES[dtype][0], "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
