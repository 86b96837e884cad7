"""GPTQ and descent on floating-point blocks, against plain loops in float64 and against rounding."""

from __future__ import annotations

import pytest
import torch

from sinkquant.methods import Problem, method_named
from sinkquant.quantize.descent import descend
from sinkquant.quantize.factor import damped_hessian, inverse_factor
from sinkquant.quantize.gptq import GPTQ
from sinkquant.recipe import Weights
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.blocks import MXFP4, NVFP4, Blocks
from sinkquant.schemes.codecs import codec_of
from sinkquant.schemes.codecs.block_scales import BlockGrid

FLOATS = pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda scheme: scheme.format)


def problem(rows: int = 24, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), (inputs.T @ inputs).double()


def grid_of(scheme: Blocks, weight: torch.Tensor) -> BlockGrid:
    whole = torch.tensor([448 * 4 / float(weight.abs().max())]) if scheme.fused_scale else None
    return BlockGrid(4, scheme.group_size or 0, whole)


def losses(new: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = new.double() - weight.double()
    return ((error @ hessian) * error).sum(1)


@FLOATS
def test_gptq_is_the_plain_loop_in_float64(scheme: Blocks) -> None:
    weight, hessian = problem()
    grid = grid_of(scheme, weight)
    method = GPTQ(4, grid.size, 0.01, act_order=False, scale_search=False, passes=0, grid=grid)
    packed = method.quantize(weight, hessian)
    factor = inverse_factor(damped_hessian(hessian, 0.01, "w")[0], 0.01, "w").double()
    work, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % grid.size == 0:
            spread = grid.spread(grid.scales(work[:, column:column + grid.size].float(), None, False))[:, 0].double()
        found[:, column] = grid.nearest_((work[:, column] / spread).float()).double() * spread
        error = (work[:, column] - found[:, column]) / factor[column, column]
        work[:, column + 1:] -= error[:, None] * factor[column, column + 1:]
    same = (packed.dequantized().double() - found).abs() < 1e-5
    assert same.all(1).float().mean() > 0.8  # a tie that float32 breaks otherwise changes what comes after it in a row
    assert torch.allclose(losses(packed.dequantized(), weight, hessian).sum(), losses(found, weight, hessian).sum(),
                          rtol=0.05)


@FLOATS
def test_each_step_leaves_less_loss_than_the_one_before(scheme: Blocks) -> None:
    weight, hessian = problem()
    grid = grid_of(scheme, weight)
    form = WeightFormat(4, grid.size, "float", storage=scheme.storage)
    nearest = codec_of(form).nearest(form, torch.bfloat16, True, grid.whole).quantize(weight, hessian.diagonal())
    plain, searched, descended = (GPTQ(4, grid.size, scale_search=search, passes=passes, grid=grid).quantize(
        weight, hessian) for search, passes in ((False, 0), (True, 0), (True, 3)))
    found = [float(losses(one.dequantized(), weight, hessian).sum()) for one in (nearest, plain, searched, descended)]
    assert found[1] < 0.8 * found[0]
    assert found[3] < found[2] < 1.05 * found[1]
    assert found[3] < 0.9 * found[1]


@FLOATS
def test_descent_raises_no_rows_loss_and_stays_on_the_grid(scheme: Blocks) -> None:
    weight, hessian = problem()
    grid = grid_of(scheme, weight)
    start = GPTQ(4, grid.size, passes=0, grid=grid).quantize(weight, hessian)
    after = descend(start, weight, hessian, 3, grid=grid)
    assert (losses(after.dequantized(), weight, hessian) <= losses(start.dequantized(), weight, hessian) * 1.0001).all()
    assert set(after.codes.abs().unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
    assert not torch.equal(after.codes, start.codes)
    # For codes that stay, the next power of two is never better.
    assert torch.equal(after.scale, start.scale) == (scheme is MXFP4)


def test_linears_that_share_a_scale_are_solved_as_one() -> None:
    weight, hessian = problem()
    form = WeightFormat(4, 16, "float", storage=NVFP4.storage)
    parts = list(weight.split([16, 8]))
    whole = codec_of(form).fused_scale(parts)
    problems = [Problem("x", form, part, torch.float8_e4m3fn, Weights(), hessian, fused_scale=whole) for part in parts]
    method = method_named("gptq")
    for one, alone in zip(method.solve_together(problems), map(method.solve, problems), strict=True):
        assert torch.equal(one.dequantized(), alone.dequantized())
