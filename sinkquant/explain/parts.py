"""The parameters in which a checkpoint differs from its baseline, by module, layer and role, and putting them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import Decoder


@dataclass(frozen=True)
class Part:
    """One parameter that differs.

    Attributes:
        name: of the parameter in the checkpoint. module: its name without "weight" or "bias".
        layer: index of its block, -1 outside. role: what it is in its block.
        parameter: the checkpoint's, changed while something is put back. quantized, unquantized: its two values.
    """

    name: str
    module: str
    layer: int
    role: str
    parameter: torch.nn.Parameter
    quantized: torch.Tensor
    unquantized: torch.Tensor

    @property
    def error(self) -> float:
        """||quantized - unquantized|| / ||unquantized||."""
        return float((self.quantized - self.unquantized).norm() / self.unquantized.norm().clamp(min=1e-30))


def different_parts(original: PreTrainedModel, quantized: PreTrainedModel) -> list[Part]:
    """All parameters that differ.

    Raises:
        RequestError: the two have not the same parameters.
    """
    decoder = Decoder.of(quantized)
    blocks, left = len(Decoder.of(original).blocks), len(decoder.blocks)
    if left != blocks:
        raise RequestError(f"the checkpoint has {left} blocks and the baseline {blocks}: it is not that model "
                           "quantized; where blocks were dropped, quantize-model compare takes it.")
    known = dict(original.named_parameters(remove_duplicate=False))
    lacking = sorted(set(known) - {name for name, _ in quantized.named_parameters(remove_duplicate=False)})
    if lacking:
        raise RequestError(f"the checkpoint lacks the parameter {lacking[0]}: it is not that model quantized.")
    found = []
    for name, parameter in quantized.named_parameters():
        before = known.get(name)
        if before is None or before.shape != parameter.shape:
            there = "which the baseline lacks" if before is None else (
                f"of the shape {list(parameter.shape)} where the baseline's is {list(before.shape)}")
            raise RequestError(f"the checkpoint has the parameter {name}, {there}: it is not that model quantized.")
        value = before.data.to(parameter.device, parameter.dtype)
        if not torch.equal(value, parameter.data):
            module = name.removesuffix(".weight").removesuffix(".bias")
            layer = next((index for index, block in enumerate(decoder.block_names) if name.startswith(f"{block}.")), -1)
            role = module[len(decoder.block_names[layer]) + 1:] if layer >= 0 else module
            found.append(Part(name, module, layer, role, parameter, parameter.data, value))
    return found


def first_block(parts: Iterable[Part]) -> int:
    """The block before which nothing of them is; 0 where one is outside the blocks."""
    return max(0, min(part.layer for part in parts))


@contextlib.contextmanager
def put_back(parts: Iterable[Part], values: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Let some parameters hold their unquantized values while the context is open, or other ones, by name."""
    changed = list(parts)
    try:
        for part in changed:
            part.parameter.data = part.unquantized if values is None else values[part.name]
        yield
    finally:
        for part in changed:
            part.parameter.data = part.quantized
