"""What a GGUF file that sinkquant wrote holds, from what stands before its data. Imports no torch."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from sinkquant.errors import RequestError
from sinkquant.schemes.gguf.layout import KINDS, MAGIC, VERSION, FileTensor, aligned

FILE = "model.gguf"
OURS = "sinkquant.json"
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of the metadata by its type; 8 is a string, 9 an array."""


def is_gguf_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose weights are in one GGUF file. A file that lies in a folder for another
    reason is a model of its own."""
    return (folder / FILE).is_file() and (folder / OURS).is_file() and (folder / "config.json").is_file()


def read_index(path: Path) -> dict[str, tuple[FileTensor, int]]:
    """The tensors of a GGUF file: name -> kind and shape, and bytes from the file's start.

    Raises:
        RequestError: the file is cut or broken, or holds kinds that are not written here.
    """
    kinds = {number: kind for kind, (number, _, _) in KINDS.items()}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content)
            magic, version, count, keys = reader.take("<4sIQQ")
            if magic != MAGIC or version != VERSION:
                raise ValueError(f"version {version}")
            for _ in range(keys):
                reader.text()
                reader.skip(reader.take("<I")[0])
            index = []
            for _ in range(count):
                name, (dimensions,) = reader.text(), reader.take("<I")
                *shape, kind, offset = reader.take(f"<{dimensions}QIQ")
                index.append((name, FileTensor(kinds[kind], tuple(int(size) for size in shape[::-1])), offset))
            start, size = aligned(reader.place), len(content)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is cut or broken, or no GGUF file of sinkquant's; copy it again.") from error
    if any(start + offset + tensor.bytes > size for _, tensor, offset in index):
        raise RequestError(f"{path} is cut: it ends before its tensors do; copy it again.")
    return {name: (tensor, start + offset) for name, tensor, offset in index}


class _Reader:
    """Walks over what stands before the tensors' data."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.place += length
        return self.content[self.place - length:self.place].decode()

    def skip(self, kind: int) -> None:
        """Over a value of the metadata."""
        if kind == 9:
            inner, count = self.take("<IQ")
            if inner in WIDTHS:
                self.place += count * WIDTHS[inner]
            else:
                for _ in range(count):
                    self.skip(inner)
        elif kind == 8:
            (length,) = self.take("<Q")
            self.place += length
        else:
            self.place += WIDTHS[kind]
