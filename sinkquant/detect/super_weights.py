"""Super weights: single scalars of a down projection without which the model breaks (Yu et al. 2411.07191).

A spike alone is no proof, random models have spikes too. It is a candidate where it is real: far over the median of
what its linear writes, a change of the residual stream as large as a whole token, and largely made by one scalar. Every
such scalar is zeroed on a few short rows; what survives is compared with a null of other large weights of its matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import SuperWeight
from sinkquant.detect.detector import Detector, Found, Progress, Survey
from sinkquant.detect.residual import ResidualStream, sampled
from sinkquant.models import Decoder, Step, Walk, weight_matrix
from sinkquant.models.blocks import attention_of, mixers_of
from sinkquant.recipe import Detection, Recipe

NULL_WEIGHTS = 3
PER_MODULE = 3
SHARE = 0.1
"""A scalar that makes less of its spike than this leaves the spike as it is."""
SCREENED_ROWS = 2
"""Rows of the first look: the paper takes one prompt."""
ABLATION_ROWS = 8
BATCH = 8
"""Rows that pass the output head together: with a large vocabulary their logits are what takes memory."""


class SuperWeights(Detector):
    """Scalars that make a spike, and that the model cannot do without."""

    fields = ("super_weights",)
    null = "what three other large weights of the same matrix cost; a super weight costs more than three times as much"

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        self.watchers: dict[Survey, SpikeWatcher] = {}

    def watch(self, survey: Survey, step: Step) -> AbstractContextManager[None]:
        """Look for spikes, in every set of rows by itself."""
        if not self.settings.super_weights:
            return contextlib.nullcontext()
        watcher = self.watchers.setdefault(survey, SpikeWatcher(self.decoder, self.settings.massive_ratio))
        return watcher.watching(step.index)

    def result(self, found: Found) -> dict[str, Any]:
        """The costliest first."""
        seen = [(self.watchers[survey], survey.stream) for survey in found.surveys if survey in self.watchers]
        return {"super_weights": confirm(self.decoder, candidates(seen), found.surveys[0].rows, self.settings,
                                         found.device, found.dtype, self.recipe.seed, found.progress)}


@dataclass(frozen=True)
class Spike:
    """The largest output of a linear, over the median of its outputs.

    Attributes:
        row: its channel.
        columns: the inputs that make most of it, the largest part first. shares: what part each makes.
    """

    ratio: float
    row: int
    columns: tuple[int, ...]
    shares: tuple[float, ...]


class SpikeWatcher:
    """Looks at the output of every block's down projection for spikes far over their median."""

    def __init__(self, decoder: Decoder, ratio: float) -> None:
        self.decoder = decoder
        self.ratio = ratio
        self.modules = [down_projection(decoder, i) for i in range(len(decoder.blocks))]
        self.spikes: dict[str, Spike] = {}

    @contextlib.contextmanager
    def watching(self, index: int) -> Iterator[None]:
        """Look at the down projection of one block while the context is open."""
        name = self.modules[index]
        if name is None:
            yield
            return

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            outputs = output.flatten(0, -2)
            sizes = outputs.abs()
            place = int(sizes.argmax())
            ratio = float(sizes.max().float() / sampled(sizes).float().median().clamp(min=1e-30))
            if ratio > max(self.ratio, self.spikes[name].ratio if name in self.spikes else 0):
                token, row = divmod(place, sizes.shape[1])
                parts = args[0].flatten(0, -2)[token].float() * weight_matrix(module)[row].float()
                shares = (parts / outputs[token, row].float()).topk(min(PER_MODULE, len(parts)))
                self.spikes[name] = Spike(ratio, row, tuple(shares.indices.tolist()), tuple(shares.values.tolist()))

        with self.decoder.linears[name].register_forward_hook(hook):
            yield


def down_projection(decoder: Decoder, index: int) -> str | None:
    """The linear of a block's MLP that writes to the residual stream, or None (fused experts have no such linear)."""
    block, name = decoder.blocks[index], decoder.block_names[index]
    mixing = {id(linear) for module in (*attention_of(block), *map(decoder.model.get_submodule, mixers_of(name, block)))
              for linear in module.modules()}
    writing = [path for path, module in decoder.linears.items()
               if path.startswith(f"{name}.") and id(module) not in mixing
               and weight_matrix(module).shape[0] == decoder.hidden_size
               and weight_matrix(module).shape[1] != decoder.hidden_size]
    return writing[-1] if writing else None


def candidates(seen: Sequence[tuple[SpikeWatcher, ResidualStream]]) -> dict[str, Spike]:
    """The spikes that are real, by module: they change the largest value of their channel of the residual stream by at
    least the norm of its median token.

    Args:
        seen: of every set of rows the spikes and the residual stream; the first that shows a module's spike counts.
    """
    found: dict[str, Spike] = {}
    for watcher, stream in seen:
        for name, spike in watcher.spikes.items():
            block = f"layers.{watcher.decoder.block_of(name)}"
            after = stream.names.index(f"{block}.mlp" if f"{block}.mlp" in stream.names else block)
            change = stream.maximum[after][spike.row] - stream.maximum[after - 1][spike.row]
            if abs(float(change)) >= float(stream.norms[after].median()) and spike.shares[0] >= SHARE:
                found.setdefault(name, spike)
    return found


def confirm(decoder: Decoder, spikes: dict[str, Spike], rows: torch.Tensor, settings: Detection, device: str,
            dtype: torch.dtype, seed: int, progress: Progress | None = None) -> list[SuperWeight]:
    """Zero every candidate and keep those that cost more loss than the threshold and than three times the null, which
    is of the same rows as the first look. What a weight costs is measured on more rows, if it passed that.

    Args:
        spikes: module -> its spike.
        rows: int64 [rows, length] of natural text.
    """
    def tried(trials: Callable[[str], list[Trial]], some: torch.Tensor, label: str) -> list[Trial]:
        return _zeroed(decoder, list(spikes), trials, Walk(decoder, some, BATCH, device, dtype), progress, label)

    def making(name: str) -> list[Trial]:
        spike = spikes[name]
        return [Trial(name, spike.row, column) for column, share in zip(spike.columns, spike.shares, strict=True)
                if share >= SHARE]

    screened = tried(making, rows[:SCREENED_ROWS], "zeroing large weights") if spikes else []
    left = [trial for trial in screened if trial.increase > settings.super_weight_loss / 2]

    harmful = {trial.module for trial in left}
    null = tried(lambda name: _null(decoder, name, spikes[name], seed) if name in harmful else [],
                 rows[:SCREENED_ROWS], "zeroing other large weights") if left else []
    largest = {name: max([0.0, *(one.increase for one in null if one.module == name)]) for name in harmful}
    left = [trial for trial in left if trial.increase > 3 * largest[trial.module]]
    tries = tried(lambda name: [Trial(name, one.row, one.column) for one in left if one.module == name],
                  rows[:ABLATION_ROWS], "zeroing super weights") if left else []
    found = [SuperWeight(module=one.module, row=one.row, column=one.column, value=one.value,
                         loss_increase=one.increase) for one in tries if one.increase > settings.super_weight_loss]
    return sorted(found, key=lambda s: -s.loss_increase)


@dataclass
class Trial:
    """One weight that is zeroed. `value` is what it was, `increase` what the mean loss is more without it."""

    module: str
    row: int
    column: int
    value: float = field(default=0.0, init=False)
    increase: float = field(default=0.0, init=False)


def _zeroed(decoder: Decoder, modules: list[str], trials: Callable[[str], list[Trial]], walk: Walk,
            progress: Progress | None, label: str) -> list[Trial]:
    """Carry out trials in one walk: each starts from the unharmed inputs of its block, and only the blocks after it are
    replayed.

    Args:
        trials: module -> what to try there; called while the module's weights are in memory.
    """
    harmed: list[torch.Tensor] = []
    done: list[Trial] = []
    for step in walk.steps():
        states = [step.replay(torch.cat(harmed))] if harmed else []
        for name in modules:
            if decoder.block_of(name) == step.index:
                for trial in trials(name):
                    states.append(_without(step, decoder.linears[name], trial))
                    done.append(trial)
        harmed = states
        if progress:
            progress(step.index + 1, len(decoder.blocks), label)
    if done:
        base = float(walk.losses().double().mean())
        losses = walk.losses(torch.cat(harmed), walk.rows.repeat(len(done), 1)).double().view(len(done), -1).mean(1)
        for trial, loss in zip(done, losses.tolist(), strict=True):
            trial.increase = loss - base
    return done


def _without(step: Step, module: nn.Module, trial: Trial) -> torch.Tensor:
    weight = weight_matrix(module)
    before = weight[trial.row, trial.column].clone()
    trial.value = float(before)
    weight[trial.row, trial.column] = 0
    try:
        return step.replay(step.walk.hidden)
    finally:
        weight[trial.row, trial.column] = before


def _null(decoder: Decoder, name: str, spike: Spike, seed: int) -> list[Trial]:
    """Other large weights of the matrix: drawn from the top thousandth by magnitude."""
    weight = weight_matrix(decoder.linears[name])
    count = max(NULL_WEIGHTS + 1, weight.numel() // 1000)
    top = weight.abs().flatten().float().topk(min(count, weight.numel())).indices
    generator = torch.Generator().manual_seed(seed)
    places = [(int(i) // weight.shape[1], int(i) % weight.shape[1])
              for i in top[torch.randperm(len(top), generator=generator)]]
    wanted = {(spike.row, column) for column in spike.columns}
    return [Trial(name, *place) for place in places if place not in wanted][:NULL_WEIGHTS]
