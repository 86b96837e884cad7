"""A plan's scales, block by block while the calibration rows walk."""

from __future__ import annotations

import torch

from sinkquant.artifacts import ModelShape, Plan, Transform
from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, Step
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.quantize.transforms.places import InputStatistics, Place, fold, places, watch, weight_of
from sinkquant.quantize.transforms.search import Reader
from sinkquant.quantize.transforms.smooth import awq, searched_smoothquant, sink_scale, smoothquant

TOLERANCE = 0.03
"""Share of what a block adds to a token by which its outputs may differ; linears left in 16 bits are rounded anew."""


def scale_block(decoder: Decoder, step: Step, plan: Plan, weights: TokenWeights,
                shape: ModelShape) -> dict[str, torch.dtype]:
    """Carry out the scales of a plan on the block at hand, whose weights are not quantized yet.

    Args:
        shape: of the model as it is stored; in the walk its dtypes are those of the computation.

    Returns:
        the parameters that have changed and are not packed later on, each with its dtype in the checkpoint.

    Raises:
        SinkquantError: the block does not compute the same afterwards.
    """
    asked = [transform for transform in plan.transforms if transform.name != "rotate"]
    if not asked:
        return {}
    stored = {name: getattr(torch, dtype) for name, (dtype, _) in shape.tensors.items()}
    # Experts are packed one by one, and their fused parameter goes with them.
    packed = frozenset({*plan.formats, *(decoder.experts[name].parameter for name in plan.formats
                                         if name in decoder.experts)})
    block = decoder.structure.blocks[step.index]
    changed: set[str] = set()
    row = step.walk.hidden[:1]
    expected = step.forward(row)
    for transform in asked:
        found = list(places(block, transform.values))
        watched = watch(decoder, step, found, weights, sampled=transform.name == "searched")
        for place, seen in zip(found, watched, strict=True):
            scale = None if seen is None else _scale(decoder, plan, transform, place, seen)
            if scale is not None and not bool((scale == 1).all()):
                changed |= fold(decoder, place, scale, stored, packed)
    # By token: beside a massive activation any error of all others is small.
    off = (step.forward(row) - expected).float().norm(dim=-1)
    added = (expected - row.to(expected)).float().norm(dim=-1)
    if float((off / added.clamp(min=1e-30)).median()) > TOLERANCE:
        raise SinkquantError(f"{step.name} does not compute the same after its channels were scaled; leave out "
                             "weights.smooth and protect.channels=scale for this architecture.")
    return {name: stored[name] for name in sorted(changed) if name.removesuffix(".weight") not in packed}


def _scale(decoder: Decoder, plan: Plan, transform: Transform, place: Place,
           seen: InputStatistics) -> torch.Tensor | None:
    """The scale of a place's channels; None where nothing that reads them is packed, or asks for it."""
    mine = [matrix for matrix in place.readers if matrix.module in plan.modules
            and plan.modules[matrix.module].form.packed]
    if not mine:
        return None
    readers = [Reader(weight_of(decoder, matrix), plan.modules[matrix.module].form) for matrix in mine]
    search = plan.calibration.scale_search
    if transform.name in ("smoothquant", "searched"):
        weights = [weight_of(decoder, matrix) for matrix in place.readers]
        if transform.name == "searched":
            return searched_smoothquant(place, seen, weights, readers, search)
        return smoothquant(place, seen, weights, 0.5 if transform.strength is None else transform.strength)
    if transform.name == "awq":
        return awq(place, seen, readers, search)
    decisions = [plan.modules[matrix.module] for matrix in mine]
    columns = {column for one in decisions if one.keep == "scale" for column in one.columns}
    return sink_scale(place, seen, readers, columns, search) if columns else None
