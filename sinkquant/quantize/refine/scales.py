"""Scales of one linear on their way, while gradients tune them and its codes stay as they are (Chen et al.
2407.11062)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sinkquant.schemes.codecs.grid import grid_of
from sinkquant.schemes.codecs.packed import PackedWeight

RATE = 2e-3
"""The first step of a scale, relative to itself: half of what lies between two bfloat16 numbers."""
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.95
"""Of the moments of the gradient. Tuning takes tens of steps: a longer memory of squares would not be filled."""
TINY = 1e-30


@dataclass
class Scales:
    """One linear whose scales are tuned by Adam (Kingma & Ba 1412.6980); `stretch` is what they have grown by, relative
    to what they were, float32 [rows, groups]. Gradients pass over the rounding of scales to what can be stored."""

    packed: PackedWeight
    stretch: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    steps: int = 0

    @classmethod
    def of(cls, packed: PackedWeight, device: str) -> Scales:
        """From what was packed."""
        zeros = torch.zeros(packed.scale.shape, device=device)
        return cls(packed.to(device), zeros, zeros.clone(), zeros.clone())

    @staticmethod
    def rate(_: int) -> float:
        """Of the first step, whatever the number of iterations."""
        return RATE

    def now(self) -> PackedWeight:
        """What would be stored of it now."""
        scale = grid_of(self.packed).storable(self.packed.spread().float() * (1 + self.stretch), self.packed.scale)
        return replace(self.packed, scale=scale)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step down.

        Args:
            gradient: of the dense weight that `now` gives, float [rows, columns], in any unit.
        """
        codes = self.packed.codes.float().reshape(*self.packed.scale.shape, -1)
        slope = (gradient.float().reshape(codes.shape) * codes).sum(-1) * self.packed.spread().float()
        self.steps += 1
        self.mean.lerp_(slope, 1 - MEAN_DECAY)
        self.square.lerp_(slope.square(), 1 - SQUARE_DECAY)
        mean = self.mean / (1 - MEAN_DECAY ** self.steps)
        square = self.square / (1 - SQUARE_DECAY ** self.steps)
        self.stretch -= rate * mean / square.sqrt().clamp(min=TINY)
