"""The input of every linear, with and without sink tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import ModuleStatistics
from sinkquant.models import Decoder, Step, Walk
from sinkquant.recipe import Detection


class _InputStatistics:
    """Running maxima and energies of a linear's input, sink positions apart."""

    def __init__(self, columns: int) -> None:
        self.sink_maximum = torch.zeros(columns)
        self.other_maximum = torch.zeros(columns)
        self.sink_energy = 0.0
        self.energy = 0.0

    def add(self, inputs: torch.Tensor, sinks: torch.Tensor) -> None:
        """inputs: [tokens, columns]; sinks: bool [tokens]."""
        for part, maximum in ((inputs[sinks], self.sink_maximum), (inputs[~sinks], self.other_maximum)):
            if len(part):
                torch.maximum(maximum, part.abs().amax(0).cpu(), out=maximum)
        self.sink_energy += float(inputs[sinks].double().square().sum())
        self.energy += float(inputs.double().square().sum())

    def summary(self, column_ratio: float) -> ModuleStatistics:
        others = float(self.other_maximum.max())
        columns = torch.nonzero(self.sink_maximum > column_ratio * others).flatten() if others > 0 else torch.empty(0)
        return ModuleStatistics(
            input_max=max(float(self.sink_maximum.max()), others), input_max_without_sinks=others,
            sink_energy=self.sink_energy / self.energy if self.energy > 0 else 0.0,
            sink_columns=[int(c) for c in columns])


def module_statistics(decoder: Decoder, rows: torch.Tensor, sinks: torch.Tensor, settings: Detection, device: str,
                      dtype: torch.dtype) -> dict[str, ModuleStatistics]:
    """Statistics of the input of every linear inside the blocks.

    `sink_columns` are the input columns in which a sink token exceeds `column_ratio` times the largest input of any
    other token: these columns alone set the range of the whole input. Linears that see only some of the tokens
    (experts that are linears of their own) are left out.

    Args:
        rows: int64 [rows, length]; sinks: bool [rows, length].
    """
    walk = Walk(decoder, rows, settings.batch_size, device, dtype)
    statistics = {name: _InputStatistics(columns)
                  for name, linear in decoder.shape("").linears.items()
                  if name in decoder.linears and (columns := linear.columns)}
    seen: set[str] = set()
    for step in walk.steps():
        handles = [decoder.linears[name].register_forward_pre_hook(_hook(item, step, sinks, seen, name))
                   for name, item in statistics.items() if name.startswith(step.name + ".")]
        try:
            step.run()
        finally:
            for handle in handles:
                handle.remove()
    return {name: item.summary(settings.column_ratio) for name, item in statistics.items() if name in seen}


def _hook(statistics: _InputStatistics, step: Step, sinks: torch.Tensor, seen: set[str], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs, mask = args[0], sinks[step.batch]
        if inputs.shape[:-1].numel() == mask.numel():
            statistics.add(inputs.reshape(mask.numel(), -1).float(), mask.flatten().to(inputs.device))
            seen.add(name)

    return hook
