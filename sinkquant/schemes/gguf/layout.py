"""The bytes of a GGUF file (version 3): header, metadata, index of tensors; and how many there will be."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALIGNMENT = 32
MAGIC, VERSION = b"GGUF", 3
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
         "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "IQ4_NL": (20, 32, 18), "BF16": (30, 1, 2)}
"""Kind of a tensor -> its number in ggml, the values of a block, the bytes of a block."""
VALUE_TYPES = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9}
_STRUCTS = {"u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?"}

Metadata = Mapping[str, tuple[str, Any]]
"""Key -> (type, value); a type in brackets is an array of it."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file: `shape` as torch has it, `source` the name in the working checkpoint."""

    kind: str
    shape: tuple[int, ...]
    source: str = ""

    @property
    def bytes(self) -> int:
        """Of its data, without what fills up to the next tensor."""
        _, values, size = KINDS[self.kind]
        total = 1
        for length in self.shape:
            total *= length
        return total // values * size


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def metadata_bytes(metadata: Metadata) -> bytes:
    """All keys and values."""
    return b"".join(_string(key) + _value(kind, value) for key, (kind, value) in metadata.items())


def head(metadata: bytes, keys: int, tensors: Mapping[str, FileTensor]) -> bytes:
    """What stands before the data of the tensors, filled up to the alignment."""
    offset, index = 0, []
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        index.append(_string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions,
                                                 KINDS[tensor.kind][0], offset))
        offset += aligned(tensor.bytes)
    content = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), keys) + metadata + b"".join(index)
    return content + bytes(aligned(len(content)) - len(content))


def file_bytes(metadata: int, tensors: Mapping[str, FileTensor]) -> int:
    """Bytes of a file whose metadata has so many."""
    index = sum(8 + len(name.encode()) + 4 + 8 * len(tensor.shape) + 12 for name, tensor in tensors.items())
    return aligned(24 + metadata + index) + sum(aligned(tensor.bytes) for tensor in tensors.values())


def write_tensors(path: Path, metadata: Metadata, tensors: Mapping[str, FileTensor],
                  data: Callable[[str], Iterable[bytes | memoryview]]) -> None:
    """Write a file, and wait until it is on the disk. data: name of a tensor -> its bytes, piece by piece."""
    with path.open("wb") as file:
        file.write(head(metadata_bytes(metadata), len(metadata), tensors))
        for name, tensor in tensors.items():
            for piece in data(name):
                file.write(piece)
            file.write(bytes(aligned(tensor.bytes) - tensor.bytes))
        file.flush()
        os.fsync(file.fileno())


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Any) -> bytes:
    if not kind.startswith("["):
        plain = _string(value) if kind == "str" else struct.pack(_STRUCTS[kind], value)
        return struct.pack("<I", VALUE_TYPES[kind]) + plain
    inner = kind[1:-1]
    head = struct.pack("<IIQ", VALUE_TYPES["array"], VALUE_TYPES[inner], len(value))
    if inner == "str":
        return head + b"".join(map(_string, value))
    return head + struct.pack(f"<{len(value)}{_STRUCTS[inner].removeprefix('<')}", *value)
