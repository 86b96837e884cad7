"""The Hessian of a linear's input, with tokens weighted by the calibration's policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sinkquant.models import Step
from sinkquant.models.hooks import hooked
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.quantize.statistics import TokenWeights


class Hessian:
    """H = sum_t w_t x_t x_t^T / sum_t w_t over the tokens of all batches, float64 [columns, columns].

    Where the inputs x' of the unquantized model are known as well, also C = sum_t w_t (x'_t - x_t) x_t^T / sum_t w_t.
    `tokens` counts them, whatever they weigh.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = self.empty(columns, device)
        self.cross_sum: torch.Tensor | None = None
        self.weight = 0.0
        self.tokens = 0

    def empty(self, columns: int, device: torch.device) -> torch.Tensor:
        """Zeros of the shape of the sum."""
        return torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor, ideal: torch.Tensor | None = None) -> None:
        """inputs, ideal: [tokens, columns]; weights: [tokens]."""
        root = weights.to(inputs.device).sqrt()[:, None]
        scaled = inputs.float() * root
        self.sum += (scaled.T @ scaled).double()
        self.weight += float(weights.sum())
        self.tokens += len(inputs)
        if ideal is not None:
            product = (((ideal.float() - inputs.float()) * root).T @ scaled).double()
            self.cross_sum = product if self.cross_sum is None else self.cross_sum + product

    def mean(self) -> torch.Tensor:
        """[columns, columns]; zeros where no token came."""
        return self.sum / max(self.weight, 1e-30)

    def cross(self) -> torch.Tensor | None:
        """[columns, columns], or None where the unquantized model's inputs were not given."""
        return None if self.cross_sum is None else self.cross_sum / max(self.weight, 1e-30)


class Diagonal(Hessian):
    """The diagonal alone, float64 [columns]: sum_t w_t x_t^2 / sum_t w_t."""

    def empty(self, columns: int, device: torch.device) -> torch.Tensor:
        """Zeros, [columns]."""
        return torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor, ideal: torch.Tensor | None = None) -> None:
        """inputs: [tokens, columns]; weights: [tokens]; ideal: None."""
        assert ideal is None
        self.sum += weights.to(inputs.device).double() @ inputs.double().square()
        self.weight += float(weights.sum())
        self.tokens += len(inputs)


def collect(step: Step, linears: dict[str, nn.Module], weights: TokenWeights,
            ideal: torch.Tensor | None = None) -> dict[str, Hessian]:
    """Replay the rows through a block and take the Hessian of the input of some of its linears: as they come out of
    its rounding, where inputs are rounded.

    Args:
        linears: name -> linear. Those that no token reaches are missing in the answer.
        ideal: [rows, length, hidden_size], what the block gets in the unquantized model; its linears then see both,
            batch by batch.
    """
    weights.enter(step)
    hessians: dict[str, Hessian] = {}
    wanted: dict[str, torch.Tensor] = {}
    comparing = False

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].flatten(0, -2)
            if comparing:
                wanted[name] = inputs
                return
            if name not in hessians:
                hessians[name] = Hessian(inputs.shape[1], inputs.device)
            other = wanted.pop(name, None)
            # A router may send other tokens than in the unquantized model: then there is nothing to compare.
            same = other is not None and other.shape == inputs.shape
            hessians[name].add(inputs, weights.of(step, inputs), other if same else None)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    with hooked(handles), step.answering(step.walk.hidden):
        for batch in step.batches(step.walk.hidden):
            step.batch = batch
            if ideal is not None:
                comparing = True
                with inputs_left_alone(step.walk.decoder.model):
                    step.forward(ideal[step.batch])
                comparing = False
            step.forward(step.walk.hidden[step.batch])
    return hessians
