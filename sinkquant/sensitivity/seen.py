"""What the linears of a block get and what comes back to them, while the block is replayed with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.backward import BackStep
from sinkquant.models.experts import ExpertLinear, handed_to_experts, read_by_expert, shares_of
from sinkquant.models.hooks import hooked
from sinkquant.quantize.experts import Routed
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import Unit


@dataclass(frozen=True)
class SeenBatch:
    """Some tokens of one linear.

    Attributes:
        inputs: [tokens, columns]. gradients: [tokens, rows], of the outputs.
        places: int64 [tokens], where they stand in the flattened rows; None where the model routes tokens to it.
        batch: the rows that they are of.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    places: torch.Tensor | None
    batch: slice

    def after(self, first: int, length: int) -> SeenBatch:
        """The tokens of the rows from `first` on, rows having `length` tokens; all where their rows are not known."""
        skipped = 0 if self.places is None else max(0, first - self.batch.start) * length
        return SeenBatch(self.inputs[skipped:], self.gradients[skipped:],
                         None if self.places is None else self.places[skipped:], self.batch)


@dataclass
class ExpertBatch:
    """What the experts of a layer got in one batch, and the gradient of what they gave, [tokens, hidden_size].

    Attributes:
        hidden: [tokens, hidden_size]. chosen: int64 [tokens, experts per token]. shares: float, alike.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor
    batch: slice
    gradient: torch.Tensor = field(init=False)


class Seen:
    """What one replay of a block showed.

    Args:
        back: the block's step; it is pulled here.
        units: those of the block.
        fitted: Hessians are of so many rows; None: of all. Those of experts are of all rows.

    Raises:
        RequestError: the block has experts that do not weigh and add up their outputs as is known.
    """

    def __init__(self, back: BackStep, decoder: Decoder, units: list[Unit], weights: TokenWeights,
                 recipe: Recipe, fitted: int | None = None) -> None:
        self.fitted = fitted
        self.back, self.decoder, self.weights, self.recipe = back, decoder, weights, recipe
        self.linears: dict[str, list[SeenBatch]] = {name: [] for unit in units if not unit.owner
                                                    for name in unit.modules}
        self.handed: dict[str, list[ExpertBatch]] = {unit.owner: [] for unit in units if unit.owner}
        self.hessians: dict[str, torch.Tensor] = {}
        self.expert: tuple[str, int, dict[str, list[SeenBatch]], dict[str, torch.Tensor]] | None = None
        with self._watching():
            back.pull()

    def of(self, unit: Unit, name: str) -> tuple[list[SeenBatch], torch.Tensor]:
        """What a linear of a unit saw, and the Hessian of its input, [columns, columns]; zeros where no token came.
        Linears that engines fuse read one input."""
        if unit.owner is None:
            if unit.modules[0] not in self.hessians:
                self.hessians = {unit.modules[0]: self._hessian(unit.modules[0], name)}
            return self.linears[name], self.hessians[unit.modules[0]]
        part = self.decoder.experts[name]
        if self.expert is None or self.expert[:2] != (part.owner, part.index):
            self.expert = (part.owner, part.index, self._expert(part), self._expert_hessians(part))
        _, _, parts, hessians = self.expert
        rows = slice(part.start, part.start + part.rows)
        mine = [SeenBatch(one.inputs, one.gradients[:, rows], one.places, one.batch) for one in parts[part.role]]
        return mine, hessians[part.role]

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        handles = [self.decoder.linears[name].register_forward_hook(self._linear_hook(name)) for name in self.linears]
        handles += [self.decoder.model.get_submodule(owner).register_forward_hook(
            self._experts_hook(owner), with_kwargs=True) for owner in self.handed]
        with hooked(handles):
            yield

    def _linear_hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            inputs, batch = args[0].detach().flatten(0, -2), self.back.step.batch
            places = self._places(batch, len(inputs))
            output.register_hook(lambda gradient: self.linears[name].append(
                SeenBatch(inputs, gradient.detach().flatten(0, -2), places, batch)))

        return hook

    def _experts_hook(self, owner: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            states, chosen = handed_to_experts(args, kwargs)
            one = ExpertBatch(states.detach(), chosen, shares_of(args, kwargs).detach(), self.back.step.batch)
            if not self.handed[owner]:
                _require_known(module, one, output.detach(), owner)
            self.handed[owner].append(one)
            output.register_hook(lambda gradient: setattr(one, "gradient", gradient.detach().flatten(0, -2)))

        return hook

    def _places(self, batch: slice, tokens: int) -> torch.Tensor | None:
        length = self.back.step.walk.rows.shape[1]
        start, stop = batch.start * length, batch.stop * length
        return torch.arange(start, stop) if stop - start == tokens else None

    def _hessian(self, first: str, name: str) -> torch.Tensor:
        hessian = Hessian(self.decoder.weight(name).shape[1], torch.device(self.back.step.walk.device))
        for one in self.linears[first]:
            rows, inputs = one.batch, one.inputs
            if self.fitted is not None and one.places is not None:
                rows = slice(rows.start, min(rows.stop, self.fitted))
                inputs = inputs[:max(0, rows.stop - rows.start) * self.back.step.walk.rows.shape[1]]
            if len(inputs):
                self.back.step.batch = rows
                hessian.add(inputs, self.weights.of(self.back.step, inputs))
        return hessian.mean()

    def _expert(self, part: ExpertLinear) -> dict[str, list[SeenBatch]]:
        """What the gate and up projections ("up"), and the down projection of one expert saw."""
        found: dict[str, list[SeenBatch]] = {"up": [], "down": []}
        length = self.back.step.walk.rows.shape[1]
        for one in self.handed[part.owner]:
            tokens, slots = torch.where(one.chosen == part.index)
            states = one.hidden[tokens]
            inner, middle = _through(part.module, part.index, states)
            arriving = one.gradient[tokens] * one.shares[tokens, slots][:, None]
            fused: Any = part.module
            (up,) = torch.autograd.grad(middle, inner, arriving @ fused.down_proj[part.index])
            places = tokens.cpu() + one.batch.start * length
            found["up"].append(SeenBatch(states, up, places, one.batch))
            found["down"].append(SeenBatch(middle.detach(), arriving, places, one.batch))
        return found

    def _expert_hessians(self, part: ExpertLinear) -> dict[str, torch.Tensor]:
        handed, walk = self.handed[part.owner], self.back.step.walk
        routed = Routed(part.module, torch.cat([one.hidden for one in handed]),
                        torch.cat([one.chosen for one in handed]).cpu(), None)
        few = int((routed.chosen == part.index).sum()) < self.recipe.calibration.min_expert_tokens
        found = routed.hessians(part.index, self.weights, few, walk.device, walk.dtype)
        return {role: hessian.mean() for role, hessian in found.items()}


def _through(module: nn.Module, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert's first projections make of states [tokens, hidden_size], and what its last one reads, with a
    graph from the second back to the first."""
    fused: Any = module
    with torch.enable_grad():
        inner = F.linear(states, fused.gate_up_proj[index]).detach().requires_grad_()
        return inner, fused._apply_gate(inner)


def _require_known(module: nn.Module, one: ExpertBatch, output: torch.Tensor, owner: str) -> None:
    """Refuse experts whose output is not the sum of what each makes of a token, times the token's share."""
    fused: Any = module
    made = torch.zeros_like(output.flatten(0, -2))
    for index in range(len(fused.down_proj)):
        tokens, slots = torch.where(one.chosen == index)
        middle = read_by_expert(module, index, one.hidden[tokens]).detach()
        made[tokens] += F.linear(middle, fused.down_proj[index]) * one.shares[tokens, slots][:, None]
    if not torch.allclose(made, output.flatten(0, -2), rtol=1e-2, atol=1e-3 * float(output.abs().max())):
        raise RequestError(f"{owner} does not add up its experts by their shares, so that their sensitivities cannot "
                           "be told; set budget.solver=even.")
