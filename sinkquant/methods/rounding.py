"""Rounding to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkquant.methods.contract import Cost, Method, Problem, Settings

if TYPE_CHECKING:
    from sinkquant.artifacts.shapes import LinearShape
    from sinkquant.schemes.codecs.packed import PackedWeight


class Rounding(Method):
    """Every weight goes to the nearest code, for any number format. Where rows walk for another reason, the mean square
    of every input column weighs its errors in the search for scales."""

    name = "rtn"

    def cost(self, shape: LinearShape, settings: Settings) -> Cost:
        return Cost(bytes=6.0 * shape.parameters, rounded=shape.parameters)

    def solve(self, problem: Problem) -> PackedWeight:
        from sinkquant.schemes.codecs import codec_of

        nearest = codec_of(problem.form).nearest(problem.form, problem.scale_dtype, problem.settings.scale_search,
                                                 problem.fused_scale)
        return nearest.quantize(problem.weight, None if problem.hessian is None else problem.hessian.diagonal())
