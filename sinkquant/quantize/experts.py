"""What the experts of a layer read: recorded once per layer, their Hessians taken one expert after the other.

A layer's experts are handed the hidden states of all tokens and, for each token, the experts that it goes to. Both are
kept; what an expert reads follows from them and its own weights, whichever of transformers' implementations runs the
layer. So the Hessians of one expert are in memory at a time, and an expert that saw few tokens can be shown all of them
without another walk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.models import Step
from sinkquant.models.experts import handed_to_experts, read_by_expert
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.ranks import total
from sinkquant.quantize.statistics import TokenWeights

TOKENS = 4096
"""Tokens of an expert that are looked at at a time."""


@dataclass
class Routed:
    """What one layer's experts are handed.

    Attributes:
        module: the experts. hidden: [tokens, hidden_size]. chosen: int64 [tokens, experts per token].
        ideal: the hidden states in the unquantized model, or None.
        everyone: the Hessian of all tokens' hidden states, once it was needed.
    """

    module: nn.Module
    hidden: torch.Tensor
    chosen: torch.Tensor
    ideal: torch.Tensor | None
    everyone: Hessian | None = None

    def counts(self) -> list[int]:
        """Tokens that go to every expert, over all processes."""
        fused: Any = self.module
        experts = len(fused.down_proj)
        flat = self.chosen.flatten()
        return [int(count) for count in total(torch.bincount(flat[flat < experts], minlength=experts))]

    @torch.no_grad()
    def hessians(self, index: int, weights: TokenWeights, everyone: bool, device: str | torch.device,
                 dtype: torch.dtype) -> dict[str, Hessian]:
        """The Hessians of what the expert's gate and up projections read ("up"), and its down projection ("down").

        Args:
            everyone: over all tokens of the layer, as if each of them went to this expert.
        """
        rows = torch.arange(len(self.hidden)) if everyone else torch.where((self.chosen == index).any(1))[0]
        up, down = (Hessian(columns, torch.device(device)) for columns in _widths(self.module))
        known = everyone and self.everyone is not None
        means = self._means(index, rows, device, dtype) if weights.capped else {}
        flat, sinks = weights.weights.flatten(), weights.sinks.flatten()
        for part in rows.split(TOKENS):
            inputs = _read(self.module, index, self.hidden[part].to(device, dtype))
            ideal = None if self.ideal is None else _read(self.module, index, self.ideal[part].to(device, dtype))
            for hessian, name in ((down, "down"),) if known else ((up, "up"), (down, "down")):
                hessian.add(inputs[name], weights.on(inputs[name], flat[part], sinks[part], means.get(name)),
                            None if ideal is None else ideal[name])
        if everyone:
            self.everyone = up if self.everyone is None else self.everyone
            up = copy.deepcopy(self.everyone)
        return {"up": up, "down": down}

    def _means(self, index: int, rows: torch.Tensor, device: str | torch.device,
               dtype: torch.dtype) -> dict[str, float]:
        """The mean squared norm of what each projection reads of some tokens, those of all processes together."""
        energy = torch.zeros(2, dtype=torch.float64)
        for part in rows.split(TOKENS):
            inputs = _read(self.module, index, self.hidden[part].to(device, dtype))
            energy += torch.stack([inputs[name].float().square().sum().double().cpu() for name in ("up", "down")])
        *sums, tokens = total(torch.cat([energy, torch.tensor([float(len(rows))], dtype=torch.float64)])).tolist()
        return {name: one / max(tokens, 1.0) for name, one in zip(("up", "down"), sums, strict=True)}


def record(step: Step, modules: dict[str, nn.Module], ideal: torch.Tensor | None = None) -> dict[str, Routed]:
    """Let the rows walk into a block as far as its experts, and keep what these are handed.

    Args:
        modules: name -> experts, inside the step's block.
        ideal: [rows, length, hidden_size], what the block gets in the unquantized model.
    """
    hidden, chosen = _handed(step, modules, step.walk.hidden)
    with inputs_left_alone(step.walk.decoder.model):
        wanted = _handed(step, modules, ideal)[0] if ideal is not None else {}
    return {name: Routed(module, hidden[name], chosen[name], wanted.get(name)) for name, module in modules.items()}


def _handed(step: Step, modules: dict[str, nn.Module],
            inputs: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    size, length = step.walk.batch_size, inputs.shape[1]
    hidden: dict[str, torch.Tensor] = {}
    chosen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    seen: set[str] = set()

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, routes = handed_to_experts(args, kwargs)
            if name not in hidden:
                hidden[name] = step.walk.store.empty((len(inputs) * length, states.shape[1]), states.dtype)
            hidden[name][step.batch.start * length:step.batch.stop * length] = states.to("cpu")
            chosen[name].append(routes.cpu())
            seen.add(name)
            if len(seen) == len(modules):
                raise _ReachedError  # what the experts make of it is not needed

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]
    try:
        for start in range(0, len(inputs), size):
            step.batch = slice(start, min(start + size, len(inputs)))
            seen.clear()
            try:
                step.forward(inputs[step.batch])
            except _ReachedError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return hidden, {name: torch.cat(parts) for name, parts in chosen.items()}


class _ReachedError(Exception):
    """All experts of the block have been handed their tokens."""


def _read(module: nn.Module, index: int, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an expert's projections read, from the hidden states of the tokens that go to it."""
    return {"up": states, "down": read_by_expert(module, index, states)}


def _widths(module: nn.Module) -> Iterator[int]:
    fused: Any = module
    yield fused.gate_up_proj.shape[2]
    yield fused.down_proj.shape[2]
