"""The Hessian of a linear's input, with sink tokens weighted by how often they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import SinkSelector
from sinkquant.models import Step


def token_weights(rows: torch.Tensor, sinks: list[SinkSelector]) -> torch.Tensor:
    """What every token weighs, float32 [rows, length]: a sink its selector's weight, any other 1.

    A token that several selectors name takes the largest weight. rows: int64 [rows, length].
    """
    weights = torch.ones(rows.shape, dtype=torch.float32)
    for sink in sinks:
        here = torch.ones_like(rows, dtype=torch.bool) if sink.token_id is None else rows == sink.token_id
        if sink.position is not None:
            here = here & (torch.arange(rows.shape[1]) == sink.position)
        weights = torch.where(here, torch.maximum(weights, torch.tensor(sink.weight)), weights)
    return weights


class Hessian:
    """H = sum_t w_t x_t x_t^T / sum_t w_t over the tokens of all batches, float64 [columns, columns]."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.weight = 0.0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        """inputs: [tokens, columns]; weights: [tokens]."""
        scaled = inputs.float() * weights.to(inputs.device).sqrt()[:, None]
        self.sum += (scaled.T @ scaled).double()
        self.weight += float(weights.sum())

    def mean(self) -> torch.Tensor:
        """[columns, columns]; zeros where no token came."""
        return self.sum / max(self.weight, 1e-30)


@contextlib.contextmanager
def collected(step: Step, linears: dict[str, nn.Module], weights: torch.Tensor) -> Iterator[dict[str, Hessian]]:
    """Collect the Hessians of some linears of a block while the context is open.

    Tokens that a router sends to one linear only are weighted 1 each, since their places are not known.

    Args:
        weights: float32 [rows, length], of all rows of the walk.
    """
    hessians: dict[str, Hessian] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].flatten(0, -2)
            batch = weights[step.batch].flatten()
            if name not in hessians:
                hessians[name] = Hessian(inputs.shape[1], inputs.device)
            hessians[name].add(inputs, batch if len(batch) == len(inputs) else torch.ones(len(inputs)))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()
