"""The shape of a model whose files are those that a sink map was made from. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.artifacts.kept_shape import KeptShape
from sinkquant.models.folder import read_settings, weight_files
from sinkquant.models.gguf import SOURCE, SOURCE_FOLDER
from sinkquant.models.gguf_index import is_gguf_checkpoint

READ_BY = ("sinkquant", "transformers", "compressed-tensors")
"""Packages that decide what modules a configuration becomes, and which of them have a place for scales of a cache."""


def keep_shape(shape: ModelShape, folder: Path) -> KeptShape | None:
    """What a sink map keeps of the shape of a folder's model; None where files alone do not tell that it is the same.

    Args:
        shape: as `Decoder.shape` gives it for what `open_model` makes of the folder.
    """
    files = files_of(folder)
    kept = None if files is None else KeptShape.of(shape, "")
    return None if kept is None or files is None else kept.model_copy(update={"files": _sealed(kept, files)})


def shape_on_record(sink_map: SinkMap | None, folder: Path, name: str) -> ModelShape | None:
    """The shape of a folder's model, where the sink map was made from the same files and keeps it as it was; else None.

    Args:
        name: what the shape calls the model.
    """
    kept = None if sink_map is None else sink_map.shape
    files = None if kept is None else files_of(folder)
    if kept is None or files is None or kept.files != _sealed(kept, files):
        return None
    return kept.restored(name, str(folder))


def files_of(folder: Path) -> str | None:
    """A hash of all that a model's shape is made from: configuration, headers of the weights, versions. None for a
    folder whose shape depends on more: code of its own, a GGUF file, or weights that are quantized."""
    if {"auto_map", "quantization_config"} & read_settings(folder).keys() or is_gguf_checkpoint(folder):
        return None
    digest = hashlib.sha256(" ".join(importlib.metadata.version(package) for package in READ_BY).encode())
    for path in (folder / name for name in ("config.json", SOURCE, SOURCE_FOLDER)):
        if path.is_file():
            digest.update(path.read_bytes())
    for path in weight_files(folder):
        with path.open("rb") as file:
            size = file.read(8)
            digest.update(path.name.encode() + size + file.read(int.from_bytes(size, "little")))
    return digest.hexdigest()


def _sealed(kept: KeptShape, files: str) -> str:
    """A hash of files and of the shape that is kept of them: one that was edited is not taken."""
    return hashlib.sha256((files + kept.model_dump_json(exclude={"files"})).encode()).hexdigest()
