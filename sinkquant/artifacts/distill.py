"""What end-to-end tuning cannot reach; known from a plan alone."""

from __future__ import annotations

from sinkquant.artifacts.formats import PLAIN
from sinkquant.artifacts.plan import Plan
from sinkquant.artifacts.shapes import ModelShape
from sinkquant.errors import RequestError

ON_OUR_GRIDS = frozenset({PLAIN, "gptq"})
"""Storages of integer codes and one scale per group."""


def check_distill(plan: Plan, shape: ModelShape) -> None:
    """Refuse a plan that tunes end to end what cannot be tuned so.

    Raises:
        RequestError: saying what to change.
    """
    if not plan.calibration.distill:
        return
    for name, form in plan.formats.items():
        if shape.linears[name].part_of:
            raise RequestError("weights.distill does not reach packed experts; set weights.distill=0, or leave the "
                               "experts in 16 bits with weights.ignore=['*.experts.*'].")
        if form.storage not in ON_OUR_GRIDS:
            raise RequestError(f"{plan.backend} rounds weights by itself, so that they cannot be tuned; set "
                               "weights.distill=0.")
        if form.kind == "float":
            raise RequestError("FP8 weights are not tuned; set weights.distill=0.")
    if plan.kv_cache and plan.kv_cache.prefix and any(decision.rounded for decision in plan.modules.values()):
        raise RequestError("weights.distill does not let the tokens of an exact prefix through rounded inputs; set "
                           "weights.distill=0, kv_cache.prefix=none or activations.format=16-bit.")
