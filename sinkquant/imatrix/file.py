"""llama.cpp's GGUF file of an importance matrix, as its `llama-imatrix` writes it and `llama-quantize` reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sinkquant.schemes.gguf.layout import FileTensor, aligned, head, metadata_bytes


@dataclass(frozen=True)
class Importance:
    """What one tensor of a model reads.

    Attributes:
        squares: float32 [matrices, columns], the sum of squares of every input channel; one row, or one per expert.
        counts: float32 [matrices], the tokens that it is of. llama.cpp divides by them.
    """

    squares: torch.Tensor
    counts: torch.Tensor


def write_importance(path: Path, found: Mapping[str, Importance], texts: Sequence[str], rows: int, length: int) -> None:
    """Write the file; there is none until it is whole.

    Args:
        found: tensor of a GGUF file -> what it reads. texts: what the calibration text is called.
        rows: of calibration ("chunks"), of `length` tokens.
    """
    metadata = {"general.type": ("str", "imatrix"), "imatrix.datasets": ("[str]", list(texts)),
                "imatrix.chunk_count": ("u32", rows), "imatrix.chunk_size": ("u32", length)}
    values: dict[str, torch.Tensor] = {}
    for name, one in sorted(found.items()):
        values[f"{name}.in_sum2"] = one.squares
        values[f"{name}.counts"] = one.counts[:, None]
    tensors = {name: FileTensor("F32", tuple(one.shape)) for name, one in values.items()}
    aside = path.with_name(f"{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(head(metadata_bytes(metadata), len(metadata), tensors))
            for name, value in values.items():
                file.write(value.contiguous().numpy().tobytes())
                file.write(bytes(aligned(tensors[name].bytes) - tensors[name].bytes))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
