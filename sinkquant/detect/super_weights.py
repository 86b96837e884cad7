"""Super weights: single scalars of a down projection without which the model breaks (Yu et al. 2411.07191).

A spike alone is no proof, random models have spikes too: every candidate is zeroed and the loss measured, beside a
null of other large weights of the same matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import SuperWeight
from sinkquant.models import Decoder, Step, Walk, weight_matrix
from sinkquant.recipe import Detection

NULL_WEIGHTS = 3
PER_MODULE = 3
ABLATION_ROWS = 16
PER_WALK = 8
"""Modules whose ablations share a walk: each keeps NULL_WEIGHTS + PER_MODULE sets of hidden states."""

Progress = Callable[[int, int, str], None]


class SpikeWatcher:
    """Looks at the input and output of every block's down projection for spikes far over their median."""

    def __init__(self, decoder: Decoder, ratio: float) -> None:
        self.decoder = decoder
        self.ratio = ratio
        self.modules = [down_projection(decoder, i) for i in range(len(decoder.blocks))]
        self.spikes: dict[str, tuple[float, int, int]] = {}

    @contextlib.contextmanager
    def watching(self, index: int) -> Iterator[None]:
        """Look at the down projection of one block while the context is open."""
        name = self.modules[index]
        if name is None:
            yield
            return

        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            inputs, outputs = args[0].abs().float(), output.abs().float()
            peak = float(outputs.max() / outputs.median().clamp(min=1e-30))
            if peak > self.ratio and peak > self.spikes.get(name, (0.0, 0, 0))[0]:
                column = int(inputs.flatten(0, -2).amax(0).argmax())
                self.spikes[name] = (peak, int(outputs.flatten(0, -2).amax(0).argmax()), column)

        handle = self.decoder.linears[name].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


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
            dtype: torch.dtype, seed: int, progress: Progress | None = None) -> list[SuperWeight]:
    """Zero every candidate and keep those that cost more loss than the threshold and than three times the null.

    The ablations of several modules share one walk: each starts from the unharmed inputs of its block.

    Args:
        rows: int64 [rows, length] of natural text.
    """
    found = []
    names = list(watcher.spikes)
    for start in range(0, len(names), PER_WALK):
        walk = Walk(decoder, rows[:ABLATION_ROWS], settings.batch_size, device, dtype)
        trials: list[_Trial] = []
        for step in walk.steps():
            for trial in trials:
                trial.hidden = step.replay(trial.hidden)
            for name in names[start:start + PER_WALK]:
                if decoder.block_of(name) == step.index:
                    trials += _ablations(step, decoder.linears[name], name, watcher.spikes[name], seed)
            if progress:
                progress(step.index + 1, len(decoder.blocks), "zeroing large weights")
        base = float(walk.losses().double().mean())
        for trial in trials:
            trial.increase = float(walk.losses(trial.hidden).double().mean()) - base
        for name in names[start:start + PER_WALK]:
            found += _judged(name, [trial for trial in trials if trial.module == name], settings)
    return sorted(found, key=lambda s: -s.loss_increase)


@dataclass
class _Trial:
    """One zeroed weight. `hidden`: the hidden states that it leads to so far, [rows, length, hidden_size]."""

    module: str
    row: int
    column: int
    value: float
    is_null: bool
    hidden: torch.Tensor
    increase: float = 0.0


def _ablations(step: Step, module: nn.Module, name: str, spike: tuple[float, int, int], seed: int) -> list[_Trial]:
    """Zero the null weights, then the candidate and the next largest of its row, one at a time."""
    _, row, column = spike
    weight = weight_matrix(module)
    places = [(r, c, True) for r, c in _null_weights(weight, row, column, seed)]
    places += [(row, c, False) for c in _largest_in_row(weight, row, column)]
    trials = []
    for r, c, is_null in places:
        before = weight[r, c].clone()
        weight[r, c] = 0
        try:
            hidden = step.replay(step.walk.hidden)
        finally:
            weight[r, c] = before
        trials.append(_Trial(name, r, c, float(before), is_null, hidden))
    return trials


def _judged(name: str, trials: list[_Trial], settings: Detection) -> list[SuperWeight]:
    """The paper's loop: zero the super weight, look for the next largest contribution to the same spike."""
    needed = max(settings.super_weight_loss, 3 * max(trial.increase for trial in trials if trial.is_null))
    found = []
    for trial in trials:
        if not trial.is_null:
            if trial.increase <= needed:
                break
            found.append(SuperWeight(module=name, row=trial.row, column=trial.column, value=trial.value,
                                     loss_increase=trial.increase))
    return found


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
