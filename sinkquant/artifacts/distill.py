"""What end-to-end tuning cannot reach; known before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping

from sinkquant.artifacts.plan import Plan
from sinkquant.artifacts.shapes import ModelShape
from sinkquant.errors import RequestError
from sinkquant.schemes import WeightFormat, scheme_of


def require_tunable(formats: Mapping[str, WeightFormat], shape: ModelShape, through: bool,
                    codes: bool) -> None:
    """Refuse to tune end to end what cannot be tuned so.

    Args:
        formats: module name -> format of every linear that is packed.
        through: whether the tokens of an exact prefix are let through rounded inputs.
        codes: whether codes are tuned beside the scales.
    """
    for name, form in formats.items():
        if shape.linears[name].part_of:
            raise RequestError("weights.distill does not reach packed experts; set weights.distill=0, or leave the "
                               "experts in 16 bits with weights.ignore=['*.experts.*'].")
        scheme = scheme_of(form)
        if scheme.rounds_itself:
            raise RequestError(f"{scheme.backend} rounds weights by itself, so that they cannot be tuned; "
                               "set weights.distill=0.")
        if not scheme.tunable:
            raise RequestError(f"{scheme.words} are not tuned; set weights.distill=0.")
        if not codes and not scheme.integers:
            raise RequestError(f"{scheme.words} have scales of 8 bits, too coarse to be tuned alone; set "
                               "weights.distill_codes=true, or weights.distill=0.")
    if through:
        raise RequestError("weights.distill does not let the tokens of an exact prefix through rounded inputs; set "
                           "weights.distill=0, kv_cache.prefix=none or activations.format=16-bit.")


def check_distill(plan: Plan, shape: ModelShape) -> None:
    """Refuse a plan that tunes end to end what cannot be tuned so."""
    if plan.calibration.distill:
        prefix = plan.kv_cache is not None and bool(plan.kv_cache.prefix)
        require_tunable(plan.formats, shape, prefix and any(one.rounded for one in plan.modules.values()),
                        plan.calibration.distill_codes)
