"""Block-wise tuning of codes and scales by sign gradients (SignRound, Cheng et al. 2309.05516)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.models import Step, as_stored
from sinkquant.models.inputs import switch_of
from sinkquant.quantize.offsets import NEAR, REACH, SCALE_RATE
from sinkquant.quantize.packed import PackedWeight
from sinkquant.quantize.scales import storable
from sinkquant.quantize.statistics import TokenWeights


@dataclass(frozen=True)
class Tune:
    """Sign-gradient descent on what a block gives, from where another method has left its codes and scales.

    The loss of a token is its squared error over the square of what the unquantized model gives there, times the
    token's weight in the statistics. All that reads the residual stream normalizes it first, so that only relative
    errors are seen; without the division the sink, whose massive activation is a hundred times the rest and nearly
    constant, would be all that the tuning attends to.
    """

    iterations: int
    seed: int = 0
    rows: int = 4

    def run(self, step: Step, linears: dict[str, nn.Module], packed: dict[str, PackedWeight],
            originals: dict[str, torch.Tensor], target: torch.Tensor, weights: TokenWeights,
            kept: dict[str, torch.Tensor] | None = None) -> dict[str, PackedWeight]:
        """Tune the linears of one block together.

        Args:
            linears: name -> module inside the step's block. packed: what they hold now.
            originals: their unquantized weights, float [rows, columns].
            target: [rows, length, hidden_size], what the block gives in the unquantized model.
            kept: name -> bool [rows, columns] of every pruned linear; codes where it is False stay 0.

        Returns:
            name -> packed weight; those that came where tuning does not lower the loss over all rows.
        """
        paths = {name: name.removeprefix(f"{step.name}.") + ".weight" for name in linears}
        variables = {name: _Variables(packed[name], originals[name], (kept or {}).get(name)) for name in linears}
        generator = torch.Generator().manual_seed(self.seed + step.index)
        for iteration in range(self.iterations):
            rate = (1 - iteration / self.iterations) / self.iterations
            chosen = torch.randperm(len(target), generator=generator)[:self.rows]
            with torch.enable_grad():
                dense = {paths[name]: as_stored(linears[name], variable.dense())
                         for name, variable in variables.items()}
                _loss(step, dense, chosen, target, weights).backward()
            for variable in variables.values():
                variable.step(rate)
        found = {name: variable.packed() for name, variable in variables.items()}
        before, after = (self._total(step, {paths[name]: as_stored(linears[name], weight.dequantized())
                                            for name, weight in candidate.items()},
                                     target, weights) for candidate in (packed, found))
        return found if after < before else packed

    def _total(self, step: Step, dense: dict[str, torch.Tensor], target: torch.Tensor, weights: TokenWeights) -> float:
        with torch.no_grad():
            return sum(float(_loss(step, dense, chosen, target, weights)) * len(chosen)
                       for chosen in torch.arange(len(target)).split(step.walk.batch_size))


class _Variables:
    """Codes and scales of one linear while they are tuned, as real numbers that are rounded on the way."""

    def __init__(self, packed: PackedWeight, original: torch.Tensor, kept: torch.Tensor | None) -> None:
        device = original.device
        self.bits, self.dtype, self.side = packed.bits, packed.scale.dtype, packed.side
        self.codes, self.scale = packed.codes.float().to(device), packed.scale.float().to(device)
        self.size = self.codes.shape[1] // self.scale.shape[1]
        # Neither what stands beside the codes is tuned, nor the columns that it takes over, nor weights pruned to zero.
        self.beside = torch.zeros_like(self.codes)
        self.free = torch.ones_like(self.codes) if kept is None else kept.to(device).float()
        if self.side is not None:
            self.side.to(device).add_to(self.beside)
            self.free[:, self.side.columns.long().to(device)] = 0
        nearest = (original.float() - self.beside) / self.scale.repeat_interleave(self.size, dim=1) - self.codes
        self.shift = (nearest.clamp(-NEAR, NEAR) * self.free).requires_grad_()
        self.stretch = torch.zeros_like(self.scale).requires_grad_()

    def dense(self) -> torch.Tensor:
        """The weight [rows, columns], rounding passed over by the gradient."""
        moved = self.codes + self.shift
        codes = torch.clamp(moved + (moved.round() - moved).detach(), -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        scale = self.scale * (1 + self.stretch)
        scale = scale + (storable(scale, self.bits, self.dtype).float() - scale).detach()
        return codes * scale.repeat_interleave(self.size, dim=1) + self.beside

    def step(self, rate: float) -> None:
        """One step of all against the sign of their gradient."""
        assert self.shift.grad is not None
        assert self.stretch.grad is not None
        with torch.no_grad():
            self.shift -= rate * self.shift.grad.sign() * self.free
            self.shift.clamp_(-REACH, REACH)
            self.stretch -= SCALE_RATE * rate * self.stretch.grad.sign()
        self.shift.grad = self.stretch.grad = None

    def packed(self) -> PackedWeight:
        """What is stored of it."""
        with torch.no_grad():
            codes = (self.codes + self.shift).round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
            return PackedWeight(codes.to(torch.int8), storable(self.scale * (1 + self.stretch), self.bits, self.dtype),
                                self.bits, self.side)


def _loss(step: Step, dense: dict[str, torch.Tensor], chosen: torch.Tensor, target: torch.Tensor,
          weights: TokenWeights) -> torch.Tensor:
    """Mean over the chosen rows' tokens of weight * relative squared error."""
    device = step.walk.device
    inputs, wanted = step.walk.hidden[chosen].to(device), target[chosen].to(device).float()
    dense = {name: weight.to(inputs.dtype) for name, weight in dense.items()}
    switch = switch_of(step.walk.decoder.model)
    if switch is not None:
        switch.exact = None if step.walk.exact is None else step.walk.exact[chosen]
    result = torch.func.functional_call(step.block, dense, (inputs,), step.walk.arguments[step.index])
    given = (result[0] if isinstance(result, tuple) else result).float()
    relative = (given - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-30)
    share = weights.weights[chosen].to(device)
    return (relative * share).sum() / share.sum().clamp(min=1e-30)
