"""The tensors of a model one at a time, from memory or from disk, under the names that its modules give them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.models.decoder import Decoder

PIECE = 1 << 25
"""Values of a large tensor that are read at a time."""


def pieces(decoder: Decoder, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """A parameter or buffer in its own dtype, as (first row, rows): large ones that lie on disk come piece by piece."""
    tensor = decoder.model.get_parameter_or_buffer(name)
    source = decoder.source
    if source is None or not tensor.is_meta:
        yield 0, tensor.data
        return
    stored = source.stored(name)
    if stored is None or tensor.dim() < 2:
        owner = decoder.model.get_submodule(name.rpartition(".")[0])
        with decoder.present([owner]):
            yield 0, decoder.model.get_parameter_or_buffer(name).data
        return
    step = max(1, PIECE // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), step):
        yield start, stored.rows(start, min(start + step, len(tensor))).to(tensor.dtype)
