"""The input of every linear, with and without sink tokens.

Which tokens are sinks is known only when the walk is over. So every token's largest input and energy are kept, and
the few entries that could set a range: enough to tell sinks apart afterwards without walking again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import ModuleStatistics
from sinkquant.detect.detector import Detector, Found, Survey
from sinkquant.models import Decoder, Step
from sinkquant.models.hooks import hooked
from sinkquant.recipe import Recipe

TOKENS = 128
"""Tokens of a batch that are looked at at a time."""


class Modules(Detector):
    """What the sinks do to the input of every linear."""

    fields = ("modules",)
    null = "without sinks their share of the energy is 0, and no column is theirs"

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        self.inputs = InputRecorder(decoder, recipe.detect.column_ratio)

    def watch(self, survey: Survey, step: Step) -> AbstractContextManager[None]:
        """Of one set of rows."""
        return self.inputs.watching(step) if survey.recorded else contextlib.nullcontext()

    def result(self, found: Found) -> dict[str, Any]:
        """By module name."""
        return {"modules": self.inputs.summary(found.sinks.mask(found.surveys[-1].rows))}


class InputRecorder:
    """Records the input of every linear of a block while `watching` is open.

    Linears that see only some of the tokens (experts that are linears of their own) are left out.
    """

    def __init__(self, decoder: Decoder, column_ratio: float) -> None:
        self.decoder, self.column_ratio = decoder, column_ratio
        self.inputs: dict[str, _Inputs] = {}

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Record all rows that are replayed."""
        handles = [linear.register_forward_pre_hook(self._hook(name, step))
                   for name, linear in self.decoder.linears.items() if name.startswith(step.name + ".")]
        with hooked(handles):
            yield

    def summary(self, sinks: torch.Tensor) -> dict[str, ModuleStatistics]:
        """What the sinks do to every input. sinks: bool [rows, length], of the recorded rows."""
        return {name: inputs.summary(sinks.flatten(), self.column_ratio) for name, inputs in self.inputs.items()}

    def _hook(self, name: str, step: Step) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            length = step.walk.rows.shape[1]
            tokens = (step.batch.stop - step.batch.start) * length
            if args[0].shape[:-1].numel() == tokens:
                self.inputs.setdefault(name, _Inputs()).add(
                    args[0].reshape(tokens, -1), step.batch.start * length, self.column_ratio)

        return hook


class _Inputs:
    """The input of one linear, token by token in the order of the rows."""

    def __init__(self) -> None:
        self.largest: list[torch.Tensor] = []
        self.energy: list[torch.Tensor] = []
        self.entries: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.floor = 0.0
        self.columns = 0

    def add(self, inputs: torch.Tensor, start: int, column_ratio: float) -> None:
        """inputs: [tokens, columns]; start: index of the first token."""
        parts, self.columns = inputs.split(TOKENS), inputs.shape[1]
        largest = torch.cat([part.abs().amax(dim=1).float() for part in parts])
        # The largest input of the tokens that are no sinks is no less than the median token's: sinks are few.
        median = float(largest.median())
        self.floor = max(self.floor, median)
        for place in torch.nonzero(largest > column_ratio * median).flatten().split(TOKENS):
            magnitudes = inputs[place].abs().float()
            token, column = torch.nonzero(magnitudes > column_ratio * median, as_tuple=True)
            self.entries.append((place[token].cpu() + start, column.cpu(), magnitudes[token, column].cpu()))
        self.energy += [part.float().square().sum(1).double().cpu() for part in parts]
        self.largest.append(largest.cpu())

    def summary(self, sinks: torch.Tensor, column_ratio: float) -> ModuleStatistics:
        """sinks: bool [tokens]. `sink_columns` are the columns in which a sink token exceeds `column_ratio` times the
        largest input of any other token, and of the median token: these columns alone set the range of the input."""
        largest, energy = torch.cat(self.largest), torch.cat(self.energy)
        others = float(largest[~sinks].max()) if not sinks.all() else 0.0
        none = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))
        token, column, value = (torch.cat(part) for part in zip(none, *self.entries, strict=True))
        alone = sinks[token] & (value > column_ratio * max(others, self.floor))
        total = float(energy.sum())
        rest = energy[~sinks] if not sinks.all() else energy
        return ModuleStatistics(
            input_max=float(largest.max()), input_max_without_sinks=others,
            sink_energy=float(energy[sinks].sum()) / total if total > 0 else 0.0,
            sink_columns=column[alone].unique().tolist() if others > 0 else [],
            input_typical=(float(rest.median()) / self.columns) ** 0.5)
