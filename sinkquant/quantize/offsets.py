"""Codes and scales of one linear as real numbers that are rounded on the way, while gradients tune them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.quantize.packed import PackedWeight
from sinkquant.quantize.scales import storable

REACH = 1.0
"""How far from where it stood a code may move before it is rounded, in codes."""
NEAR = 0.4
"""A weight that was rounded elsewhere than to its nearest code starts this far towards that one."""
SCALE_RATE = 0.1
"""The step of a scale, relative to itself, over the step of a code."""
LEAN_STEPS = 127
HELD = -128
"""In `leanings`: a weight that stays as it is."""


def leanings(packed: PackedWeight, original: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Where every weight lies beside its code, which is what tuning starts from.

    Args:
        original: float [rows, columns], the weight before it was rounded.
        kept: bool [rows, columns] of a pruned linear; weights where it is False are held.

    Returns:
        int8 [rows, columns] on the CPU, in 127ths of `NEAR` codes; `HELD` for pruned weights and for columns that
        stand beside the codes.
    """
    beside = torch.zeros(packed.codes.shape)
    if packed.side is not None:
        packed.side.to("cpu").add_to(beside)
    scale = packed.scale.cpu().float().repeat_interleave(packed.codes.shape[1] // packed.scale.shape[1], dim=1)
    away = (original.cpu().float() - beside) / scale - packed.codes.cpu().float()
    lean = (away.clamp(-NEAR, NEAR) * (LEAN_STEPS / NEAR)).round().to(torch.int8)
    if kept is not None:
        lean[~kept.cpu()] = HELD
    if packed.side is not None:
        lean[:, packed.side.columns.long().cpu()] = HELD
    return lean


@dataclass
class Offsets:
    """One linear on its way: `shift` is what its codes have moved by, `stretch` what its scales have grown by.

    Gradients pass over the rounding (straight through) and stop where a code is clamped. What is held is only what
    cannot be computed again: 5 bytes a weight.
    """

    packed: PackedWeight
    shift: torch.Tensor
    stretch: torch.Tensor

    @classmethod
    def of(cls, packed: PackedWeight, lean: torch.Tensor, device: str) -> Offsets:
        """From where `leanings` says that its weights lie."""
        here = PackedWeight(packed.codes.to(device), packed.scale.to(device), packed.bits,
                            None if packed.side is None else packed.side.to(device))
        shift = lean.to(device).float() * (NEAR / LEAN_STEPS)
        shift[lean.to(device) == HELD] = float("nan")
        return cls(here, shift, torch.zeros(here.scale.shape, device=device))

    def now(self) -> PackedWeight:
        """What would be stored of it now."""
        low, high = -(2 ** (self.packed.bits - 1)), 2 ** (self.packed.bits - 1) - 1
        codes = (self.packed.codes + self.shift.nan_to_num(0.0)).round_().clamp_(low, high).to(torch.int8)
        scale = storable(self.packed.scale.float() * (1 + self.stretch), self.packed.bits, self.packed.scale.dtype)
        return PackedWeight(codes, scale, self.packed.bits, self.packed.side)

    def step(self, gradient: torch.Tensor, rate: float, scale_rate: float) -> None:
        """One step against the sign of the gradient.

        Args:
            gradient: of the dense weight that `now` gives, float [rows, columns].
            rate: in codes. scale_rate: relative to a scale.
        """
        now = self.now()
        grouped = gradient.float().reshape(*now.scale.shape, -1)
        upwards = (grouped * now.scale.float()[..., None]).sign_().reshape(gradient.shape)
        moved = (self.packed.codes + self.shift.nan_to_num(0.0)).round_()
        upwards *= moved == now.codes  # no way on from beyond the ends of the grid
        self.shift = (self.shift - rate * upwards).clamp_(-REACH, REACH)
        codes = now.codes.reshape(grouped.shape)
        self.stretch -= scale_rate * ((grouped * codes).sum(-1) * self.packed.scale.float()).sign_()
