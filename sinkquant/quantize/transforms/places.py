"""Where a scale of channels can be folded in, what goes through there, and the folding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sinkquant.models import Decoder, Step
from sinkquant.models.hooks import hooked
from sinkquant.models.structure import BlockStructure, Matrix, Norm, Pair
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.statistics import TokenWeights


@dataclass(frozen=True)
class Place:
    """Channels that a norm or a linear (`source`) makes and that `readers` read. `reads` [columns]: the channel behind
    every column of a reader; None: each its own."""

    source: Norm | Pair
    readers: tuple[Matrix, ...]
    reads: torch.Tensor | None = None

    def columns(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale of every column of a reader from that of the channels."""
        return scale if self.reads is None else scale[self.reads.to(scale.device)]

    def channels(self, of_columns: torch.Tensor, largest: bool) -> torch.Tensor:
        """One value per channel from one per column: the largest, or the mean, of the columns that it feeds."""
        if self.reads is None:
            return of_columns
        count = int(self.reads.max()) + 1
        return torch.zeros(count, dtype=of_columns.dtype, device=of_columns.device).scatter_reduce_(
            0, self.reads.to(of_columns.device), of_columns, "amax" if largest else "mean", include_self=False)


SAMPLE = 64
"""Tokens of a batch that are kept, evenly spread."""


class InputStatistics:
    """What the columns of a place's readers have seen: the Hessian, the weighted mean of |x|, and the largest |x| of
    any token; one that weighs less than 1 counts with the root of its weight there, as it does in the Hessian. Where
    `sampled`, some of the tokens themselves as well."""

    def __init__(self, columns: int, device: torch.device, sampled: bool = False) -> None:
        self.hessian = Hessian(columns, device)
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.largest = torch.zeros(columns, device=device)
        self.sampled, self._sample = sampled, list[torch.Tensor]()

    def add(self, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        """inputs: [tokens, columns]; weights: [tokens]."""
        if not len(inputs):
            return
        self.hessian.add(inputs, weights)
        sizes = inputs.float().abs()
        self.total += (sizes * weights[:, None]).sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, (sizes * weights.clamp(max=1).sqrt()[:, None]).amax(0))
        if self.sampled:
            self._sample.append(inputs[::-(-len(inputs) // SAMPLE)].float())

    def tokens(self) -> torch.Tensor:
        """Some inputs, float32 [tokens, columns]."""
        return torch.cat(self._sample)

    @property
    def mean(self) -> torch.Tensor:
        """float32 [columns]."""
        return (self.total / max(self.hessian.weight, 1e-30)).float()


def places(block: BlockStructure, values: bool) -> Iterator[Place]:
    """Every place of a block; with `values` also the one between attention's values and its output."""
    if block.values is not None and values:
        yield Place(block.values, (block.values.second,), block.values.reads)
    for norm, matrices in block.reads:
        if norm is not None and norm.gain is not None and matrices and not block.unknown:
            yield Place(norm, matrices)
    for pair in block.inner:
        yield Place(pair, (pair.second,))


def watch(decoder: Decoder, step: Step, found: list[Place], weights: TokenWeights,
          sampled: bool = False) -> list[InputStatistics | None]:
    """Replay the rows through a block and see what goes through some of its places; None where no token came.
    sampled: whether some of the tokens are kept."""
    weights.enter(step)
    seen: list[InputStatistics | None] = [None] * len(found)

    def hook(index: int, inputs: torch.Tensor) -> None:
        rows = inputs.flatten(0, -2)
        kept = seen[index] = seen[index] or InputStatistics(rows.shape[1], rows.device, sampled)
        kept.add(rows, weights.of(step, rows))

    def after(index: int) -> Any:
        return lambda _, __, output: hook(index, output)

    def before(index: int) -> Any:
        return lambda _, args: hook(index, args[0])

    handles = []
    for index, place in enumerate(found):
        if isinstance(place.source, Norm):
            module = decoder.model.get_submodule(place.source.name)
            handles.append(module.register_forward_hook(after(index)))
        else:
            handles.append(decoder.model.get_submodule(place.source.second.module).register_forward_pre_hook(
                before(index)))
    with hooked(handles):
        for batch in step.batches(step.walk.hidden):
            step.batch = batch
            step.forward(step.walk.hidden[batch])
    return seen


def fold(decoder: Decoder, place: Place, scale: torch.Tensor, stored: dict[str, torch.dtype],
         packed: frozenset[str]) -> set[str]:
    """Divide the channels of a place by `scale` [channels], and multiply what reads them by it.

    A norm's gain is rounded as it will be stored, and the linears take what it was really divided by.

    Args:
        stored: parameter name -> dtype in the checkpoint. packed: linears that are rounded later on.

    Returns:
        the parameters that have changed.
    """
    changed: set[str] = set()

    def put(name: str, values: torch.Tensor) -> None:
        parameter = decoder.model.get_parameter(name)
        if name.removesuffix(".weight") not in packed:
            values = values.to(stored[name])
        parameter.data = values.to(parameter.device, parameter.dtype)
        changed.add(name)

    def get(name: str) -> torch.Tensor:
        return decoder.model.get_parameter(name).data.double()

    scale = scale.double()
    source = place.source
    if isinstance(source, Norm):
        assert source.gain is not None
        gain = source.offset + get(source.gain)
        put(source.gain, gain / scale - source.offset)
        rounded = source.offset + get(source.gain)
        scale = torch.where((gain == 0) | (rounded == 0), scale, gain / rounded)
        if source.bias is not None:
            put(source.bias, get(source.bias) / scale)
    else:
        rows = source.rows.to(scale.device)
        weight = get(source.first.weight)
        over = weight.T if source.first.transposed else weight
        over[rows] /= scale[:, None]
        put(source.first.weight, weight)
        if source.first.bias is not None:
            bias = get(source.first.bias)
            bias[rows] /= scale
            put(source.first.bias, bias)
    columns = place.columns(scale)
    for matrix in place.readers:
        put(matrix.weight, get(matrix.weight) * (columns[:, None] if matrix.transposed else columns))
    return changed


def weight_of(decoder: Decoder, matrix: Matrix) -> torch.Tensor:
    """The weight as it stands, float32 [..., out, in]."""
    weight = decoder.model.get_parameter(matrix.weight).data.float()
    return weight.transpose(-1, -2) if matrix.transposed else weight

