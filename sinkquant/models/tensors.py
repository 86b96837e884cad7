"""The tensors of a model one at a time, from memory or from disk, under the names that its modules give them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.models.alone import stored_parts
from sinkquant.models.decoder import Decoder
from sinkquant.models.experts import by_expert
from sinkquant.models.source import WeightSource
from sinkquant.models.stored import runs_of_rows


def pieces(decoder: Decoder, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """A parameter or buffer in its own dtype, as (first row, rows): large ones that lie on disk come piece by piece."""
    tensor = decoder.model.get_parameter_or_buffer(name)
    source = decoder.source
    if source is None or not tensor.is_meta:
        yield 0, tensor.data
        return
    if experts := _experts(decoder, source, name):
        yield from experts
        return
    stored = source.stored(name)
    if stored is None or tensor.dim() < 2:
        owner = decoder.model.get_submodule(name.rpartition(".")[0])
        with decoder.present([owner]):
            yield 0, decoder.model.get_parameter_or_buffer(name).data
        return
    for start, stop in runs_of_rows(stored.shape):
        yield start, stored.rows(start, stop).to(tensor.dtype)


def _experts(decoder: Decoder, source: WeightSource, name: str) -> Iterator[tuple[int, torch.Tensor]] | None:
    """A fused parameter expert by expert; None where that cannot be done, or it is none."""
    mine = {part: one for part, one in decoder.experts.items() if one.parameter == name}
    found = stored_parts(source, mine)
    if not mine or len(found) < len(mine):
        return None
    return ((index, torch.cat([found[part].read() for part in parts])[None])
            for (_, index), parts in by_expert(mine).items())
