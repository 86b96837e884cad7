"""Block-wise tuning of codes and scales by sign gradients (SignRound, Cheng et al. 2309.05516)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from sinkquant.models import Step, as_stored
from sinkquant.models.inputs import switch_of
from sinkquant.quantize.refine.offsets import Offsets, rounding_offsets
from sinkquant.quantize.refine.refine import refine
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.schemes.codecs.packed import PackedWeight


def tune(step: Step, linears: dict[str, nn.Module], packed: dict[str, PackedWeight],
         originals: dict[str, torch.Tensor], target: torch.Tensor, weights: TokenWeights,
         kept: dict[str, torch.Tensor], iterations: int, seed: int) -> dict[str, PackedWeight]:
    """Tune the linears of one block together, towards what the block gives in the unquantized model.

    Args:
        linears: name -> module inside the step's block. packed: what they hold now.
        originals: their unquantized weights, float [rows, columns].
        target: [rows, length, hidden_size], what the block gives in the unquantized model.
        kept: name -> bool [rows, columns] of every pruned linear; codes where it is False stay 0.

    Returns:
        name -> packed weight; those that came where tuning does not lower the loss over all rows.
    """
    tuned = {name: Offsets.of(packed[name], rounding_offsets(packed[name], originals[name], kept.get(name)))
             for name in linears}
    return refine(tuned, BlockOutput(step, linears, target, weights), iterations, seed + step.index).weights


@dataclass
class BlockOutput:
    """How far what a block gives is from what it gives in the unquantized model.

    The loss of a token is its squared error over the square of what the unquantized model gives there, times the
    token's weight in the statistics. All that reads the residual stream normalizes it first, so that only relative
    errors are seen; without the division the sink, whose massive activation is a hundred times the rest and nearly
    constant, would be all that the tuning attends to.
    """

    step: Step
    linears: dict[str, nn.Module]
    target: torch.Tensor
    weights: TokenWeights
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.target)

    def put(self, name: str, packed: PackedWeight) -> None:
        self.dense[name] = as_stored(self.linears[name], packed.dequantized()).to(self.step.walk.hidden.dtype)

    def gradients(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {name: dense.detach().requires_grad_() for name, dense in self.dense.items()}
        with torch.enable_grad():  # of nothing else: norms and biases of the caller's would keep theirs
            found = torch.autograd.grad(self._mean(chosen, leaves), list(leaves.values()), allow_unused=True)
        return {name: as_stored(self.linears[name], gradient) for name, gradient in zip(leaves, found, strict=True)
                if gradient is not None}

    def loss(self) -> float:
        with torch.no_grad():
            return sum(float(self._mean(chosen, self.dense)) * len(chosen)
                       for chosen in torch.arange(self.rows).split(self.step.walk.batch_size))

    def _mean(self, chosen: torch.Tensor, dense: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the chosen rows' tokens of weight * relative squared error."""
        walk = self.step.walk
        inputs = walk.hidden[chosen].to(walk.device)
        wanted = self.target[chosen].to(walk.device).float()
        switch = switch_of(walk.decoder.model)
        if switch is not None:
            switch.exact = None if walk.exact is None else walk.exact[chosen]
        inside = {f"{name.removeprefix(f'{self.step.name}.')}.weight": weight for name, weight in dense.items()}
        result = torch.func.functional_call(self.step.block, inside, (inputs,), walk.arguments[self.step.index])
        given = (result[0] if isinstance(result, tuple) else result).float()
        relative = (given - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-30)
        share = self.weights.weights[chosen].to(walk.device)
        return (relative * share).sum() / share.sum().clamp(min=1e-30)
