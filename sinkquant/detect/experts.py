"""What the experts of every layer read, with and without sink tokens, which of them the sinks go to, and which make
the massive activations: the super experts (Su et al. 2507.23279).

The hidden states that a layer's experts are handed and the choices of its router are seen; what an expert's down
projection reads follows from them and its weights. As with other linears, which tokens are sinks is known only when the
walk is over, so that a few numbers per token and chosen expert are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sinkquant.artifacts.sinkmap import ExpertStatistics, SuperExpert
from sinkquant.detect.detector import Detector, Found, Survey
from sinkquant.models import Decoder, Step
from sinkquant.models.experts import (
    fused_parameters,
    handed_to_experts,
    hands_over_choice,
    read_by_expert,
    those_chosen,
)
from sinkquant.models.hooks import hooked
from sinkquant.models.on_disk import TOKENS, one_expert
from sinkquant.recipe import Recipe

QUANTILE = 0.995
"""Of the largest outputs of all experts; a super expert's is over it."""


class Experts(Detector):
    """What the sinks do to the experts of every layer."""

    fields = ("experts", "super_experts")
    null = ("without sinks no expert has any of their tokens, and without massive activations none is a super expert; "
            "beside each stands the largest output of the experts that are none")

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        self.recorder = ExpertRecorder(decoder)

    def watch(self, survey: Survey, step: Step) -> AbstractContextManager[None]:
        """Of one set of rows."""
        return self.recorder.watching(step) if survey.recorded else contextlib.nullcontext()

    def result(self, found: Found) -> dict[str, Any]:
        """By the name of a layer's experts."""
        experts = self.recorder.summary(found.sinks.mask(found.surveys[-1].rows))
        places = {channel.born for channels in found.massive for channel in channels}
        born = {int(place.split(".")[1]) for place in places if place != "embedding"}
        if (emergence := found.fields["emergence"]) is not None:
            born.add(emergence.block)
        return {"experts": experts, "super_experts": super_experts(experts, self.decoder.block_of, born)}


def super_experts(experts: dict[str, ExpertStatistics], block_of: Callable[[str], int],
                  born: Collection[int]) -> list[SuperExpert]:
    """The experts that make massive activations, by the paper's criterion: what the down projection gives is over
    `QUANTILE` of all experts' and over a tenth of the largest, in a block in which massive activations are born.

    Args:
        experts: by the name of a layer's experts. block_of: such a name -> the index of its block.
    """
    outputs = [(value, owner, index) for owner, one in experts.items() for index, value in enumerate(one.output_max)]
    if not outputs or not born:
        return []
    values = torch.tensor([value for value, _, _ in outputs], dtype=torch.float64)
    least = max(float(torch.quantile(values, QUANTILE)), 0.1 * float(values.max()))
    found = [(value, owner, index) for value, owner, index in outputs if value > least and block_of(owner) in born]
    null = max((value for value, owner, index in outputs if (value, owner, index) not in found), default=0.0)
    return [SuperExpert(experts=owner, expert=index, output=value, null=null)
            for value, owner, index in sorted(found, key=lambda one: (-one[0], one[1], one[2]))]


class ExpertRecorder:
    """Records what the experts of a block are handed while `watching` is open."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers: dict[str, _Layer] = {}
        plain = {part.owner for part in decoder.experts.values()}
        self.owners = {name.rpartition(".")[0]: (len(parameter), name.rpartition(".")[0] in plain)
                       for name, parameter in fused_parameters(decoder.model, decoder.block_names).items()}

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Record all rows, which are replayed once."""
        mine = [owner for owner in self.owners if owner.startswith(step.name + ".")]
        handles = [self.decoder.model.get_submodule(owner).register_forward_pre_hook(
            self._hook(owner, step), with_kwargs=True) for owner in mine]
        with hooked(handles):
            yield
        for owner in mine:
            if owner in self.layers and self.owners[owner][1]:
                self.layers[owner].close(step, owner)

    def summary(self, sinks: torch.Tensor) -> dict[str, ExpertStatistics]:
        """What the sinks do to the experts of every layer whose router shows what it chose.

        Args:
            sinks: bool [rows, length], of the recorded rows.
        """
        return {owner: layer.summary(sinks.flatten()) for owner, layer in self.layers.items()}

    def _hook(self, owner: str, step: Step) -> Any:
        experts, plain = self.owners[owner]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not hands_over_choice(args, kwargs):
                return
            handed = handed_to_experts(args, kwargs)
            length = step.walk.rows.shape[1]
            first = step.batch.start * length
            if len(handed[0]) == step.batch.stop * length - first:
                layer = self.layers.setdefault(owner, _Layer(experts))
                layer.add(*handed)
                if plain:
                    layer.remember(step, first, handed[0])

        return hook


class _Layer:
    """One layer's experts, batch by batch in the order of the rows."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.chosen: list[torch.Tensor] = []
        self.up: list[torch.Tensor] = []
        self.down: torch.Tensor | None = None
        self.output: list[float] = []
        self.states: torch.Tensor | None = None

    def add(self, states: torch.Tensor, chosen: torch.Tensor) -> None:
        """states: [tokens, hidden_size]; chosen: int64 [tokens, experts per token]."""
        self.chosen.append(chosen.cpu())
        self.up.append(states.float().abs().amax(1).cpu())

    def remember(self, step: Step, first: int, states: torch.Tensor) -> None:
        """Keep the states [tokens, hidden_size] of the tokens from `first` on until the block is done."""
        if self.states is None:
            self.states = step.walk.store.empty((step.walk.rows.numel(), states.shape[1]), states.dtype)
        self.states[first:first + len(states)] = states.cpu()

    def close(self, step: Step, owner: str) -> None:
        """Compute what the down projections read, one expert after the other."""
        assert self.states is not None
        chosen, module = torch.cat(self.chosen), step.walk.decoder.model.get_submodule(owner)
        self.down, self.output = torch.zeros(chosen.shape), [0.0] * self.experts
        for index in those_chosen(chosen, self.experts):
            token, slot = torch.where(chosen == index)
            with one_expert(module, index, step.on_disk.get(owner)) as (one, place):
                for mine, where in zip(token.split(TOKENS), slot.split(TOKENS), strict=True):
                    read = read_by_expert(one, place, self.states[mine].to(step.walk.device))
                    self.down[mine, where] = read.float().abs().amax(1).cpu()
                    given = functional.linear(read, one.down_proj[place])  # type: ignore[index]
                    self.output[index] = max(self.output[index], float(given.float().abs().max()))
        self.states = None

    def summary(self, sinks: torch.Tensor) -> ExpertStatistics:
        """sinks: bool [tokens]."""
        chosen, up = torch.cat(self.chosen), torch.cat(self.up)
        slots = chosen.shape[1]
        inside = (chosen < self.experts).flatten()
        flat = chosen.flatten()[inside]
        on_sink = sinks[:, None].expand(-1, slots).flatten()[inside]

        def largest(values: torch.Tensor, wanted: torch.Tensor) -> list[float]:
            found = torch.zeros(self.experts)
            return found.scatter_reduce_(0, flat[wanted], values.flatten()[inside][wanted], "amax").tolist()

        def both(values: torch.Tensor) -> tuple[list[float], list[float]]:
            return largest(values, torch.ones_like(on_sink)), largest(values, ~on_sink)

        counts = [torch.bincount(part, minlength=self.experts).tolist() for part in (flat, flat[on_sink])]
        up_max, up_without = both(up[:, None].expand(-1, slots))
        down_max, down_without = both(self.down) if self.down is not None else ([], [])
        return ExpertStatistics(tokens=counts[0], sink_tokens=counts[1], input_max=up_max,
                                input_max_without_sinks=up_without, down_input_max=down_max,
                                down_input_max_without_sinks=down_without, output_max=self.output)
