"""A working checkpoint of safetensors -> the one GGUF file, a tensor at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from sinkquant.models.folder import weight_files
from sinkquant.models.gguf_index import FILE
from sinkquant.models.gguf_tensors import row_order
from sinkquant.models.shards import StoredTensor, stored_tensors
from sinkquant.schemes.gguf.layout import FileTensor, write_tensors
from sinkquant.schemes.gguf.metadata import family_of, model_metadata, read_json, rope_factors
from sinkquant.schemes.gguf.names import CODES, Family, file_name, is_gain
from sinkquant.schemes.gguf.scheme import ROPE, Blocks

PIECE = 1 << 24
"""Values that are converted at a time."""


def write_file(folder: Path, scheme: Blocks, architecture: str, written: Callable[[], None]) -> None:
    """Write the file of a folder's safetensors, and remove these.

    Args:
        architecture: transformers' class. written: called before the safetensors files are removed.

    Raises:
        RequestError: llama.cpp has no name for something of the model.
        OSError: the disk is full.
    """
    family, stored, config = family_of(architecture), stored_tensors(folder), read_json(folder / "config.json")
    replaced = [*weight_files(folder), *folder.glob("*.safetensors.index.json")]
    tensors = scheme.file_tensors({name: (str(one.dtype).removeprefix("torch."), list(one.shape))
                                   for name, one in stored.items()
                                   if (there := file_name(family, name)) and _is_run(there, config)}, family, folder)
    most = Counter(tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1).most_common(1)[0][0]
    metadata = model_metadata(folder, architecture, most)
    aside = folder / f".{FILE}"

    def data(name: str) -> Iterator[memoryview]:
        if name == ROPE:
            yield numpy.asarray(rope_factors(folder), dtype=numpy.float32).data
        else:
            for piece in _converted(stored[tensors[name].source], tensors[name], name, family, config):
                yield piece.numpy().data

    try:
        write_tensors(aside, metadata, tensors, data)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    written()
    for path in replaced:
        path.unlink()
    aside.rename(folder / FILE)


def _is_run(name: str, config: Mapping[str, Any]) -> bool:
    """Whether llama.cpp computes with a tensor of the file: not with those of blocks beyond the last one, which it
    refuses."""
    block = re.match(r"blk\.(\d+)\.", name)
    return block is None or int(block[1]) < int(config["num_hidden_layers"])


def _converted(stored: StoredTensor, tensor: FileTensor, name: str, family: Family,
               config: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in the file, uint8, piece by piece."""
    order = row_order(config, family, name, stored.shape[0])
    whole = order is not None or len(stored.shape) == 1
    step = stored.shape[0] if whole else max(1, PIECE // stored.shape[1])
    for start in range(0, stored.shape[0], step):
        rows = stored.rows(start, min(start + step, stored.shape[0]))
        if order is not None:
            rows = rows[order]
        if family.norms_plus_one and is_gain(name):
            rows = rows.float() + 1
        yield _bytes(rows, tensor.kind, tensor.source.rpartition(".")[2] in CODES)


def _bytes(rows: torch.Tensor, kind: str, packed: bool) -> torch.Tensor:
    """Values as a kind of ggml's stores them, uint8; what is packed already as it is."""
    if packed:
        return rows.contiguous().reshape(-1)
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return torch.from_numpy(quantize(rows.float().numpy(), GGMLQuantizationType.Q8_0)).reshape(-1)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return rows.to(dtype).contiguous().reshape(-1).view(torch.uint8)
