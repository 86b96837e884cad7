"""Headers of safetensors files: what they promise, and whether the file keeps it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from sinkquant.errors import RequestError
from sinkquant.schemes import tensors

DTYPES = {name: (dtype, width) for dtype, (name, width) in tensors.DTYPES.items()} | {"F8_E5M2": ("float8_e5m2", 1)}
"""Kinds of numbers that are read here, each with torch's name and its bytes. Others hold packed codes or their scales
(U32 of MLX, F8_E8M0 of MXFP8)."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `offset` bytes from the file's start, `size` bytes long. `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, Entry]:
    """The header of a safetensors file, tensor name -> entry, each as long as its shape says.

    Raises:
        RequestError: the file is shorter than its header says, is no safetensors file, or holds a kind of numbers that
            only quantized checkpoints hold.
    """
    length = os.stat(path).st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > length - 8:
            raise RequestError(f"{path} is truncated inside its header; copy it again.")
        try:
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            raw = {str(name): (str(entry["dtype"]), tuple(int(n) for n in entry["shape"]),
                               int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
                   for name, entry in header.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise RequestError(f"{path} is not a safetensors file; copy it again.") from error
    entries = {}
    for name, (kind, shape, start, stop) in raw.items():
        dtype, width = DTYPES.get(kind, ("", 0))
        if not dtype:
            raise RequestError(f"{path} holds {name} as {kind}, which is how packed weights are stored: the model is "
                               "quantized already; start from the unquantized model.")
        if min(shape, default=0) < 0 or start < 0 or stop - start != width * math.prod(shape):
            raise RequestError(f"{path} is not a safetensors file: the size of {name} is not that of its shape; copy "
                               "it again.")
        entries[name] = Entry(dtype, shape, 8 + size + start, stop - start)
    needed = max((entry.offset + entry.size for entry in entries.values()), default=8 + size)
    if length < needed:
        raise RequestError(f"{path} is truncated: it has {length} of {needed} bytes; copy it again.")
    return entries
