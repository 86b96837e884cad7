"""A method that a package of its own brings: the example of docs/develop/add-a-method.md."""

from __future__ import annotations

import torch

from sinkquant.artifacts import LinearShape
from sinkquant.methods import Cost, Method, Problem, Settings
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.packed import PackedWeight, group_scales, to_codes


class ErrorDiffusion(Method):
    """What rounding a weight loses is added to the weight on its right, as printers do it with grey."""

    name = "error-diffusion"

    def takes(self, form: WeightFormat) -> str:
        return "" if form.kind == "int" else "rounds to integers only"

    def cost(self, shape: LinearShape, settings: Settings) -> Cost:
        return Cost(bytes=4.0 * shape.parameters, columns=shape.columns)

    def solve(self, problem: Problem) -> PackedWeight:
        bits, weight = problem.form.bits, problem.weight.float()
        scale = group_scales(weight, bits, problem.form.group_size or -1, problem.scale_dtype)
        size = weight.shape[1] // scale.shape[1]
        codes = torch.empty(weight.shape, dtype=torch.int8)
        lost = torch.zeros(len(weight), 1)
        for column in range(weight.shape[1]):
            here = scale[:, column // size, None]
            wanted = weight[:, column, None] + lost
            codes[:, column, None] = to_codes(wanted, here, bits)
            if problem.kept is not None:
                codes[:, column] *= problem.kept[:, column]
            lost = (wanted - codes[:, column, None] * here.float()).clamp(-here.abs().float(), here.abs().float())
        return PackedWeight(codes, scale, bits)
