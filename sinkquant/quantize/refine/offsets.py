"""Codes and scales of one linear as real numbers that are rounded on the way, while the signs of gradients tune them
(SignRound, Cheng et al. 2309.05516)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sinkquant.schemes.codecs.grid import TunableGrid, grid_of
from sinkquant.schemes.codecs.packed import PackedWeight

RATE = 1.0
"""Steps of a code go from this over the number of iterations down to nothing."""
REACH = 1.0
"""How far from where it stood a code may move before it is rounded, in codes: from one number of the grid to the next.
"""
NEAR = 0.4
"""A weight that was rounded elsewhere than to its nearest code starts this far towards that one."""
SCALE_RATE = 0.1
"""The step of a scale, relative to itself, over the step of a code."""
OFFSET_STEPS = 127
HELD = -128
"""In compressed offsets: a weight that stays as it is."""


def rounding_offsets(packed: PackedWeight, original: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """How far every weight lies from its code, which is what tuning starts from.

    Args:
        original: float [rows, columns], the weight before it was rounded.
        kept: bool [rows, columns] of a pruned linear; weights where it is False are held.

    Returns:
        float32 [rows, columns] on the original's device, in codes, at most `NEAR` in size; NaN for weights that are
        held: pruned ones, and columns that stand beside the codes.
    """
    device = original.device
    beside, grid = torch.zeros(packed.codes.shape, device=device), grid_of(packed)
    if packed.outliers is not None:
        packed.outliers.to(device).add_to(beside)
    scale = packed.spread().to(device).float().repeat_interleave(packed.codes.shape[1] // packed.scale.shape[1], dim=1)
    real = grid.places((original.float() - beside) / scale)
    offsets = (real - grid.places(packed.codes.to(device).float())).clamp_(-NEAR, NEAR)
    if kept is not None:
        offsets[~kept.to(device)] = float("nan")
    if packed.outliers is not None:
        offsets[:, packed.outliers.columns.long().to(device)] = float("nan")
    return offsets


def compressed(offsets: torch.Tensor) -> torch.Tensor:
    """Offsets in one byte each: int8 [rows, columns] on the CPU, in 127ths of `NEAR` codes, `HELD` where they are
    NaN."""
    steps = (offsets * (OFFSET_STEPS / NEAR)).round()
    return steps.nan_to_num(HELD).to("cpu", torch.int8)


def decompressed(steps: torch.Tensor, device: str) -> torch.Tensor:
    """What `compressed` was given, to half a step, float32 [rows, columns]."""
    steps = steps.to(device)
    offsets = steps.float() * (NEAR / OFFSET_STEPS)
    offsets[steps == HELD] = float("nan")
    return offsets


@dataclass
class Offsets:
    """One linear on its way: `shift` is what its codes have moved by, NaN where they are held, `stretch` what its
    scales have grown by.

    Gradients pass over the rounding (straight through) and stop where a code is clamped. What is held is only what
    cannot be computed again: 5 bytes a weight.
    """

    packed: PackedWeight
    shift: torch.Tensor
    stretch: torch.Tensor

    @classmethod
    def of(cls, packed: PackedWeight, shift: torch.Tensor) -> Offsets:
        """From where `rounding_offsets` says that its weights lie, on the device of these."""
        device = shift.device
        return cls(packed.to(device), shift, torch.zeros(packed.scale.shape, device=device))

    @property
    def grid(self) -> TunableGrid:
        """What its codes are of."""
        return grid_of(self.packed)

    def now(self) -> PackedWeight:
        """What would be stored of it now."""
        codes = self.grid.at_(self._moved()).to(torch.int8)
        scale = self.grid.storable(self.packed.spread().float() * (1 + self.stretch), self.packed.scale)
        return replace(self.packed, codes=codes, scale=scale)

    @staticmethod
    def rate(iterations: int) -> float:
        """Of the first of so many steps."""
        return RATE / iterations

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step against the sign of the gradient.

        Args:
            gradient: of the dense weight that `now` gives, float [rows, columns].
            rate: in codes; a scale moves by `SCALE_RATE` of it, relative to itself.
        """
        now, grid = self.now(), self.grid
        grouped = gradient.float().reshape(*now.scale.shape, -1)
        upwards = (grouped * now.spread().float()[..., None]).sign_().reshape(gradient.shape)
        # No way on from beyond the ends of the grid.
        upwards *= self._moved().round_() == grid.places(now.codes.float())
        self.shift = (self.shift - rate * upwards).clamp_(-REACH, REACH)
        codes = now.codes.reshape(grouped.shape)
        self.stretch -= rate * SCALE_RATE * ((grouped * codes).sum(-1) * self.packed.spread().float()).sign_()

    def _moved(self) -> torch.Tensor:
        """The places of its codes on the grid, as far as they have moved, float32 [rows, columns]."""
        return self.grid.places(self.packed.codes.float()) + self.shift.nan_to_num(0.0)
