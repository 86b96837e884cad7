"""GPTQ (Frantar et al. 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sinkquant.methods.contract import Cost, Method, Problem, Settings
from sinkquant.schemes import WeightFormat, scheme_of

if TYPE_CHECKING:
    from sinkquant.artifacts.shapes import LinearShape
    from sinkquant.schemes.codecs.packed import PackedWeight


class GPTQMethod(Method):
    """Columns are rounded one after the other, and those to come make up for the error; then rounds of coordinate
    descent come back to all."""

    name = "gptq"
    needs_hessian = True

    def takes(self, form: WeightFormat) -> str:
        scheme = scheme_of(form)
        known = scheme.integers or scheme.grid
        return "" if known else "rounds to a fixed set of numbers with a scale per group only"

    def cost(self, shape: LinearShape, settings: Settings) -> Cost:
        rows, columns = shape.rows, shape.columns
        # Two Cholesky factors, an inverse and its product; the blocks' updates; the products of every descent round.
        return Cost(bytes=48.0 * columns**2 + 16.0 * shape.parameters, columns=columns,
                    operations=5.0 * columns**3 + (12.0 * settings.descent + 7) * rows * columns**2)

    def solve(self, problem: Problem) -> PackedWeight:
        from sinkquant.quantize.gptq import GPTQ
        from sinkquant.schemes.codecs import codec_of

        assert problem.hessian is not None
        settings, form = problem.settings, problem.form
        grid = codec_of(form).grid(form, problem.scale_dtype, problem.fused_scale)
        method = GPTQ(form.bits, form.group_size or -1, settings.damping, settings.act_order, problem.scale_dtype,
                      settings.scale_search, passes=settings.descent, grid=grid)
        return method.quantize(problem.weight, problem.hessian, problem.name, problem.cross, problem.kept,
                               problem.factored)

    def solve_together(self, problems: Sequence[Problem]) -> list[PackedWeight]:
        """One matrix of all rows: the Hessian is factored once, and every column visited once."""
        if len(problems) == 1:
            return [self.solve(problems[0])]
        import torch

        kept = None
        if any(one.kept is not None for one in problems):
            kept = torch.cat([torch.ones_like(one.weight, dtype=torch.bool) if one.kept is None else one.kept
                              for one in problems])
        whole = self.solve(replace(problems[0], weight=torch.cat([one.weight for one in problems]), kept=kept))
        return whole.split([len(one.weight) for one in problems])
