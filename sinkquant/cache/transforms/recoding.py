"""All that one layer's keys, or its values, go through before they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sinkquant.artifacts.kv import KVCachePlan, KVRotation
from sinkquant.cache.transforms.rotation import Basis, Hadamard, Rotation


@dataclass(frozen=True)
class Recoding:
    """The pieces in the order in which states go through them.

    Attributes:
        rotation: of the channels; None for none.
        scale_tokens: whether every token is divided by its length, which is stored.
        clip: whether ranges are cut to where rounding errs least.
    """

    rotation: Rotation | None = None
    scale_tokens: bool = False
    clip: bool = False

    def of(self, heads: Sequence[int]) -> Recoding:
        """That of some heads, in this order."""
        return self if self.rotation is None else replace(self, rotation=self.rotation.of(heads))


@dataclass(frozen=True)
class LayerBases:
    """The matrices of one layer that were found on calibration text; None where a plan names none."""

    keys: Basis | None = None
    values: Basis | None = None


def recodings(plan: KVCachePlan, bases: LayerBases | None) -> tuple[Recoding, Recoding]:
    """What keys and values of one layer go through.

    Args:
        bases: None as long as they are not known; a rotation by covariance is then left out.
    """
    bases = bases or LayerBases()
    return (Recoding(_rotation(plan.rotate, bases.keys), plan.scale_tokens, plan.clip in ("keys", "both")),
            Recoding(_rotation(plan.value_rotation, bases.values), False, plan.clip in ("values", "both")))


def _rotation(name: KVRotation, basis: Basis | None) -> Rotation | None:
    return Hadamard() if name == "hadamard" else basis if name == "covariance" else None
