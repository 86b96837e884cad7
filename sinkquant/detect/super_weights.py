"""Super weights: single scalars of a down projection without which the model breaks (Yu et al. 2411.07191).

A spike alone is no proof, random models have spikes too: every candidate is zeroed and the loss measured, beside a
null of other large weights of the same matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import SuperWeight
from sinkquant.models import Decoder, Walk, weight_matrix
from sinkquant.recipe import Detection

NULL_WEIGHTS = 3
PER_MODULE = 3
ABLATION_ROWS = 16


class SpikeWatcher:
    """Looks at the input and output of every block's down projection for spikes far over their median."""

    def __init__(self, decoder: Decoder, ratio: float) -> None:
        self.decoder = decoder
        self.ratio = ratio
        self.modules = [down_projection(decoder, i) for i in range(len(decoder.blocks))]
        self.spikes: dict[str, tuple[float, int, int]] = {}

    def handles(self, index: int) -> list[Any]:
        """Hooks on the down projection of one block; the caller removes them."""
        name = self.modules[index]
        if name is None:
            return []

        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs, outputs = args[0].abs().float(), output.abs().float()
            peak = float(outputs.max() / outputs.median().clamp(min=1e-30))
            if peak > self.ratio and peak > self.spikes.get(name, (0.0, 0, 0))[0]:
                column = int(inputs.flatten(0, -2).amax(0).argmax())
                self.spikes[name] = (peak, int(outputs.flatten(0, -2).amax(0).argmax()), column)

        return [self.decoder.linears[name].register_forward_hook(hook)]


def down_projection(decoder: Decoder, index: int) -> str | None:
    """The linear of a block's MLP that writes to the residual stream, or None (fused experts have no such linear)."""
    attention = {id(linear) for module in decoder.blocks[index].modules()
                 if "attention" in type(module).__name__.lower() for linear in module.modules()}
    prefix = decoder.block_names[index] + "."
    writing = [name for name, module in decoder.linears.items()
               if name.startswith(prefix) and id(module) not in attention
               and weight_matrix(module).shape[0] == decoder.hidden_size
               and weight_matrix(module).shape[1] != decoder.hidden_size]
    return writing[-1] if writing else None


def confirm(decoder: Decoder, watcher: SpikeWatcher, rows: torch.Tensor, settings: Detection, device: str,
            dtype: torch.dtype, seed: int) -> list[SuperWeight]:
    """Zero every candidate and keep those that cost more loss than the threshold and than three times the null.

    Args:
        rows: int64 [rows, length] of natural text.
    """
    if not watcher.spikes:
        return []
    rows = rows[:ABLATION_ROWS]
    base = _loss(decoder, rows, settings, device, dtype)
    found = []
    for name, (_, row, column) in watcher.spikes.items():
        module = decoder.linears[name]
        weight = weight_matrix(module).clone()
        null = max(_ablated(decoder, module, r, c, rows, settings, device, dtype) - base
                   for r, c in _null_weights(weight, row, column, seed))
        needed = max(settings.super_weight_loss, 3 * null)
        # The paper's loop: zero the super weight, look for the next largest contribution to the same spike.
        for other in _largest_in_row(weight, row, column):
            increase = _ablated(decoder, module, row, other, rows, settings, device, dtype) - base
            if increase <= needed:
                break
            found.append(SuperWeight(module=name, row=row, column=other, value=float(weight[row, other]),
                                     loss_increase=increase))
    return sorted(found, key=lambda s: -s.loss_increase)


def _largest_in_row(weight: torch.Tensor, row: int, column: int) -> list[int]:
    """The candidate's column, then the columns of the largest other weights of its row."""
    order = weight[row].abs().argsort(descending=True).tolist()
    return [column, *[c for c in order if c != column]][:PER_MODULE]


def _null_weights(weight: torch.Tensor, row: int, column: int, seed: int) -> list[tuple[int, int]]:
    """Coordinates of other large weights of the matrix: drawn from the top thousandth by magnitude."""
    count = max(NULL_WEIGHTS + 1, weight.numel() // 1000)
    top = weight.abs().flatten().float().topk(min(count, weight.numel())).indices
    generator = torch.Generator().manual_seed(seed)
    places = [(int(i) // weight.shape[1], int(i) % weight.shape[1])
              for i in top[torch.randperm(len(top), generator=generator)]]
    return [place for place in places if place != (row, column)][:NULL_WEIGHTS]


def _ablated(decoder: Decoder, module: nn.Module, row: int, column: int, rows: torch.Tensor, settings: Detection,
             device: str, dtype: torch.dtype) -> float:
    # The walk gives a module new storage when it casts it, so the matrix is fetched again before it is mended.
    before = weight_matrix(module)[row, column].clone()
    weight_matrix(module)[row, column] = 0
    try:
        return _loss(decoder, rows, settings, device, dtype)
    finally:
        weight_matrix(module)[row, column] = before


def _loss(decoder: Decoder, rows: torch.Tensor, settings: Detection, device: str, dtype: torch.dtype) -> float:
    walk = Walk(decoder, rows, settings.batch_size, device, dtype)
    for _ in walk.steps():
        pass
    return float(walk.losses().double().mean())
