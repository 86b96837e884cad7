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
from sinkquant.models.experts import read_by_expert
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.models.on_disk import TOKENS, ExpertsOnDisk, one_expert
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.ranks import total
from sinkquant.quantize.statistics import TokenWeights


@dataclass
class Routed:
    """What one layer's experts are handed.

    Attributes:
        module: the experts. hidden: [tokens, hidden_size]. chosen: int64 [tokens, experts per token].
        ideal: the hidden states in the unquantized model, or None.
        everyone: the Hessian of all tokens' hidden states, once it was needed.
        on_disk: the experts, where they are not in memory.
    """

    module: nn.Module
    hidden: torch.Tensor
    chosen: torch.Tensor
    ideal: torch.Tensor | None
    everyone: Hessian | None = None
    on_disk: ExpertsOnDisk | None = None

    def counts(self) -> list[int]:
        """Tokens that go to every expert, over all processes."""
        fused: Any = self.module
        experts = len(fused.down_proj)
        flat = self.chosen.flatten()
        return [int(count) for count in total(torch.bincount(flat[flat < experts], minlength=experts))]

    @torch.no_grad()
    def hessians(self, index: int, weights: TokenWeights, everyone: bool, device: str | torch.device,
                 dtype: torch.dtype, kind: type[Hessian] = Hessian) -> dict[str, Hessian]:
        """The Hessians of what the expert's gate and up projections read ("up"), and its down projection ("down").

        Args:
            everyone: over all tokens of the layer, as if each of them went to this expert.
            kind: what is summed up.
        """
        rows = torch.arange(len(self.hidden)) if everyone else torch.where((self.chosen == index).any(1))[0]
        up, down = (kind(columns, torch.device(device)) for columns in _widths(self.module))
        known = everyone and self.everyone is not None
        flat, sinks = weights.weights.flatten(), weights.sinks.flatten()
        with one_expert(self.module, index, self.on_disk) as (module, place):
            means = self._means(module, place, rows, device, dtype) if weights.capped else {}
            for part in rows.split(TOKENS):
                inputs = _read(module, place, self.hidden[part].to(device, dtype))
                ideal = None if self.ideal is None else _read(module, place, self.ideal[part].to(device, dtype))
                for hessian, name in ((down, "down"),) if known else ((up, "up"), (down, "down")):
                    hessian.add(inputs[name], weights.on(inputs[name], flat[part], sinks[part], means.get(name)),
                                None if ideal is None else ideal[name])
        if everyone:
            self.everyone = up if self.everyone is None else self.everyone
            up = copy.deepcopy(self.everyone)
        return {"up": up, "down": down}

    def _means(self, module: nn.Module, place: int, rows: torch.Tensor, device: str | torch.device,
               dtype: torch.dtype) -> dict[str, float]:
        """The mean squared norm of what each projection reads of some tokens, those of all processes together."""
        energy = torch.zeros(2, dtype=torch.float64)
        for part in rows.split(TOKENS):
            inputs = _read(module, place, self.hidden[part].to(device, dtype))
            energy += torch.stack([inputs[name].float().square().sum().double().cpu() for name in ("up", "down")])
        *sums, tokens = total(torch.cat([energy, torch.tensor([float(len(rows))], dtype=torch.float64)])).tolist()
        return {name: one / max(tokens, 1.0) for name, one in zip(("up", "down"), sums, strict=True)}


def record(step: Step, modules: dict[str, nn.Module], ideal: torch.Tensor | None = None) -> dict[str, Routed]:
    """Let the rows walk into a block as far as its experts, and keep what these are handed.

    Args:
        modules: name -> experts, inside the step's block.
        ideal: [rows, length, hidden_size], what the block gets in the unquantized model.
    """
    handed = step.handed(modules, step.walk.hidden)
    with inputs_left_alone(step.walk.decoder.model):
        wanted = step.handed(modules, ideal) if ideal is not None else {}
    return {name: Routed(module, handed[name].states, handed[name].chosen,
                         wanted[name].states if name in wanted else None, on_disk=step.on_disk.get(name))
            for name, module in modules.items()}


def _read(module: nn.Module, index: int, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an expert's projections read, from the hidden states of the tokens that go to it."""
    return {"up": states, "down": read_by_expert(module, index, states)}


def _widths(module: nn.Module) -> Iterator[int]:
    fused: Any = module
    yield fused.gate_up_proj.shape[2]
    yield fused.down_proj.shape[2]
