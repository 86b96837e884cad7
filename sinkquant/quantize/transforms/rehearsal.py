"""What the names of a model's modules promise is tried before it is relied on."""

from __future__ import annotations

import contextlib

import torch

from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk, together
from sinkquant.quantize.transforms.rotate import Rotate

LENGTH = 16
TOLERANCE = 1e-3
"""Largest difference over the largest value, in float32; where something is not equivalent it is of the order of 1."""


def rehearse(decoder: Decoder, rotate: Rotate) -> None:
    """Compare blocks before and after a rotation on random inputs: the first of every kind, a kind being the names of
    its parameters. The model is as it was afterwards.

    Raises:
        RequestError: a block does not compute the same.
    """
    edits = rotate.edits(decoder)
    stream = rotate.stream(decoder, decoder.structure) if rotate.scope == "full" else None
    kinds = [frozenset(name for name, _ in block.named_parameters()) for block in decoder.blocks]
    firsts = {kinds.index(kind) for kind in kinds}
    generator = torch.Generator().manual_seed(rotate.seed)
    rows = torch.randint(decoder.vocabulary, (1, min(LENGTH, decoder.max_length)), generator=generator)
    inputs = torch.randn(1, rows.shape[1], decoder.hidden_size, generator=generator)
    with contextlib.closing(together([Walk(decoder, rows, 1, whole=True)])) as walking:
        for (step,) in walking:
            step.outputs = step.walk.hidden  # it is not run: what goes in here is random
            if step.index in firsts:
                expected = step.forward(inputs)
                kept = {name: parameter.data for name, parameter in step.block.named_parameters()}
                for name, parameter in step.block.named_parameters():
                    edit = edits.get(f"{step.name}.{name}")
                    parameter.data = parameter.data if edit is None else edit(parameter.data)
                found = step.forward(inputs if stream is None else stream.apply(inputs.double()).float())
                for name, parameter in step.block.named_parameters():
                    parameter.data = kept[name]
                wanted = expected if stream is None else stream.apply(expected.double()).float()
                if float((found - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
                    raise RequestError(f"weights.rotate={rotate.scope} is not possible: {step.name} does not compute "
                                       "the same after it; set weights.rotate=none.")
            if step.index == max(firsts):
                return

