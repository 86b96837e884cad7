"""All that one layer's keys, or its values, go through before they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from sinkquant.artifacts.kv import KVCachePlan, KVRotation
from sinkquant.cache.transforms.descent import Descent
from sinkquant.cache.transforms.rotation import Basis, Hadamard, Rotation


@dataclass(frozen=True)
class Recoding:
    """The pieces in the order in which states go through them.

    Attributes:
        rotation: of the channels; None for none.
        scale_tokens: whether every token is divided by its length, which is stored.
        clip: whether ranges are cut to where rounding errs least.
        descent: what chooses the codes of a key together; None for the nearest ones.
    """

    rotation: Rotation | None = None
    scale_tokens: bool = False
    clip: bool = False
    descent: Descent | None = None

    def of(self, heads: Sequence[int]) -> Recoding:
        """That of some heads, in this order."""
        return self if self.rotation is None else replace(
            self, rotation=self.rotation.of(heads), descent=None if self.descent is None else self.descent.of(heads))


@dataclass(frozen=True)
class LayerBases:
    """The matrices of one layer that were found on calibration text; None where a plan names none.

    Attributes:
        keys, values: what they are rotated by.
        descent: of the queries that meet rotated keys.
    """

    keys: Basis | None = None
    values: Basis | None = None
    descent: Descent | None = None
    moved: dict[torch.device, LayerBases] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> LayerBases:
        """The same on a device. It is moved there once, not at every read."""
        if device not in self.moved:
            keys, values = (None if one is None else Basis(one.matrix.to(device), one.inverse.to(device))
                            for one in (self.keys, self.values))
            self.moved[device] = LayerBases(
                keys, values, None if self.descent is None else Descent(self.descent.moment.to(device)))
        return self.moved[device]

    def lacks(self, plan: KVCachePlan) -> bool:
        """Whether a plan asks for matrices that are not here."""
        return ((plan.rotate == "covariance" and self.keys is None)
                or (plan.value_rotation == "covariance" and self.values is None)
                or (plan.rounding == "descent" and self.descent is None))


def recodings(plan: KVCachePlan, bases: LayerBases | None) -> tuple[Recoding, Recoding]:
    """What keys and values of one layer go through.

    Args:
        bases: None as long as they are not known; a rotation by covariance is then left out.
    """
    bases = bases or LayerBases()
    return (Recoding(_rotation(plan.rotate, bases.keys), plan.scale_tokens, plan.clip in ("keys", "both"),
                     bases.descent if plan.rounding == "descent" else None),
            Recoding(_rotation(plan.value_rotation, bases.values), False, plan.clip in ("values", "both")))


def _rotation(name: KVRotation, basis: Basis | None) -> Rotation | None:
    return Hadamard() if name == "hadamard" else basis if name == "covariance" else None
