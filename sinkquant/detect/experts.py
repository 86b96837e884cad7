"""What the experts of every layer read, with and without sink tokens, and which of them the sinks go to.

The hidden states that a layer's experts are handed and the choices of its router are seen; what an expert's down
projection reads follows from them and its weights. As with other linears, which tokens are sinks is known only when the
walk is over, so that a few numbers per token and chosen expert are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts.sinkmap import ExpertStatistics
from sinkquant.models import Decoder, Step
from sinkquant.models.experts import fused_parameters, handed_to_experts, hands_over_choice, read_by_expert


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
        """Record all rows that are replayed."""
        handles = [self.decoder.model.get_submodule(owner).register_forward_pre_hook(
            self._hook(owner, step), with_kwargs=True) for owner in self.owners if owner.startswith(step.name + ".")]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def summary(self, sinks: torch.Tensor) -> dict[str, ExpertStatistics]:
        """What the sinks do to the experts of every layer whose router shows what it chose.

        Args:
            sinks: bool [rows, length], of the recorded rows.
        """
        return {owner: layer.summary(sinks.flatten()) for owner, layer in self.layers.items()}

    def _hook(self, owner: str, step: Step) -> Any:
        experts, plain = self.owners[owner]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not hands_over_choice(args, kwargs):
                return
            handed = handed_to_experts(args, kwargs)
            tokens = (step.batch.stop - step.batch.start) * step.walk.rows.shape[1]
            if len(handed[0]) == tokens:
                self.layers.setdefault(owner, _Layer(experts)).add(module if plain else None, *handed)

        return hook


class _Layer:
    """One layer's experts, batch by batch in the order of the rows."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.chosen: list[torch.Tensor] = []
        self.up: list[torch.Tensor] = []
        self.down: list[torch.Tensor] = []

    def add(self, module: nn.Module | None, states: torch.Tensor, chosen: torch.Tensor) -> None:
        """states: [tokens, hidden_size]; chosen: int64 [tokens, experts per token]. module: the experts, where what
        their down projections read can be computed."""
        self.chosen.append(chosen.cpu())
        self.up.append(states.float().abs().amax(1).cpu())
        if module is None:
            return
        down = torch.zeros(chosen.shape)
        for index in chosen.unique().tolist():
            token, slot = torch.where(chosen == index)
            if index < self.experts:
                down[token.cpu(), slot.cpu()] = read_by_expert(module, index, states[token]).float().abs().amax(1).cpu()
        self.down.append(down)

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
        down_max, down_without = both(torch.cat(self.down)) if self.down else ([], [])
        return ExpertStatistics(tokens=counts[0], sink_tokens=counts[1], input_max=up_max,
                                input_max_without_sinks=up_without, down_input_max=down_max,
                                down_input_max_without_sinks=down_without)
