"""Changes of the weights after which the model computes the same, and quantizes better."""

from __future__ import annotations

from sinkquant.artifacts import Plan
from sinkquant.models import Decoder
from sinkquant.quantize.transforms.rotate import Rotate, rehearse
from sinkquant.quantize.transforms.scale import scale_block


def rotation(plan: Plan) -> Rotate | None:
    """The rotation that a plan asks for."""
    asked = plan.rotation
    return None if asked is None or asked.scope is None else Rotate(asked.scope, plan.seed)


def require_equivalent(decoder: Decoder, plan: Plan) -> None:
    """Try a plan's rotation on the first block of every kind, without changing the model.

    Raises:
        RequestError: the model does not compute the same after it.
    """
    asked = rotation(plan)
    if asked is not None:
        rehearse(decoder, asked)


def rotate(decoder: Decoder, plan: Plan) -> None:
    """Carry out a plan's rotation, if it has one, on a model that is not rotated yet."""
    asked = rotation(plan)
    if asked is not None:
        asked.apply(decoder)
