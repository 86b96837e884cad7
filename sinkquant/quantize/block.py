"""What quantization makes of one block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sinkquant.artifacts import ModuleDecision
from sinkquant.schemes.codecs import PackedWeight, StoredWeight


@dataclass(frozen=True)
class QuantizedBlock:
    """What `quantized_blocks` did to one block, or to some of it.

    Attributes:
        weights: module name -> packed weight. losses: module name -> relative error that it was left with.
        dense: parameter name -> its new values in the model's dtype, for what was changed and stays in 16 bits.
        kept: module name -> bool [rows, columns], the weights that pruning has left; others are zero.
        silent: output projection -> bool [columns], the input columns of heads that were taken out.
        fused_scales: module name -> scale of its whole tensor, in formats that share one among fused linears.
        input_scales: module name -> stored scale of its inputs, [1], where it has one.
        tokens: module name of a layer's experts -> calibration tokens that went to each of them.
        offsets: module name -> how far its weights lie from their codes (`refine.compressed`), where the whole model is
            tuned in the end.
        ended: False where more of this block is to come: its experts are not all in memory at a time.
    """

    index: int
    name: str
    weights: dict[str, StoredWeight]
    losses: dict[str, float]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    silent: dict[str, torch.Tensor] = field(default_factory=dict)
    fused_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    offsets: dict[str, torch.Tensor | None] = field(default_factory=dict)
    ended: bool = True


def inside(block: str, todo: dict[str, ModuleDecision]) -> dict[str, ModuleDecision]:
    """What a plan decides about the modules of a block."""
    return {name: decision for name, decision in todo.items() if name.startswith(f"{block}.")}


def by_input(source: Mapping[str, str]) -> dict[str, list[str]]:
    """What is read -> the modules that read it, in their order. source: module name -> what it reads."""
    shared: dict[str, list[str]] = {}
    for name, read in source.items():
        shared.setdefault(read, []).append(name)
    return shared


def with_codes(weights: dict[str, StoredWeight]) -> dict[str, PackedWeight]:
    """Those whose codes a method has chosen: what a backend rounds is neither tuned nor handed over."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
