"""safetensors files whose layout is known before their contents: tensors are written in any order, in place.

Nothing is held in memory but the tensor at hand, and a file that was written half can be gone on with. The bytes are
those that safetensors itself would write.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from sinkquant.artifacts.base import write_atomically
from sinkquant.errors import SinkquantError
from sinkquant.models.folder import INDEX, SINGLE
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes.tensors import Tensor, checkpoint_files, file_header, tensor_bytes, total_bytes


class CheckpointWriter:
    """The weight files of a checkpoint while they are being written.

    Args:
        tensors: every tensor of the checkpoint, name -> (dtype, shape).
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.places: dict[str, tuple[Path, int]] = {}
        files = checkpoint_files(tensors)
        names = [SINGLE] if len(files) == 1 else [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        self.paths = [folder / name for name in names]
        for path, file in zip(self.paths, files, strict=True):
            self._prepare(path, file)
        if len(files) > 1:
            weight_map = {tensor: path.name for path, file in zip(self.paths, files, strict=True) for tensor in file}
            total = total_bytes(tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def write(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        """Write a tensor, or some rows of it from row `start` on.

        Raises:
            SinkquantError: it is not what was announced.
        """
        dtype, shape = self.tensors[name]
        if str(value.dtype) != f"torch.{dtype}" or list(value.shape[1:]) != shape[1:] or (
                shape and start + len(value) > shape[0]):
            raise SinkquantError(f"{name} is {value.dtype} {list(value.shape)}, but {dtype} {shape} was planned.")
        path, offset = self.places[name]
        row = tensor_bytes(dtype, shape[1:]) if shape else 0
        with path.open("r+b", buffering=0) as file:
            file.seek(offset + start * row)
            view = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                done += file.write(view[done:])

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it stands in its file now."""
        dtype, shape = self.tensors[name]
        path, offset = self.places[name]
        return StoredTensor(path, offset, getattr(torch, dtype), tuple(shape))[...]

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _prepare(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Give a file its header and its size, unless a run that was interrupted has done so."""
        header = file_header(tensors)
        size = len(header) + total_bytes(tensors.values())
        if not path.is_file() or path.stat().st_size != size or _start(path, len(header)) != header:
            with path.open("wb") as file:
                file.write(header)
                file.truncate(size)
        for name, entry in json.loads(header[8:]).items():
            if name != "__metadata__":
                self.places[name] = (path, len(header) + int(entry["data_offsets"][0]))


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
