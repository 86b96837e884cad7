"""Asymmetric integers: exact in their files, the better scales, and methods that keep to a group's numbers."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant import Recipe, RequestError
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.quantize.gptq import GPTQ
from sinkquant.schemes import WeightFormat, gptq
from sinkquant.schemes.codecs import codec_of
from sinkquant.schemes.codecs.grid import Nearest, to_integers
from sinkquant.schemes.codecs.zeros import ZeroGrid, ZeroWeight


def weights(shift: float, rows: int = 24, columns: int = 128) -> torch.Tensor:
    """Groups of 32 whose middles differ by up to `shift` standard deviations."""
    generator = torch.Generator().manual_seed(3)
    middles = shift * torch.randn(rows, columns // 32, generator=generator).repeat_interleave(32, 1)
    return 0.02 * (torch.randn(rows, columns, generator=generator) + middles)


def test_a_scale_times_a_zero_point_is_exact_in_float16() -> None:
    grid = ZeroGrid(4, 32)
    spread = torch.logspace(-7, 3, 4000, base=10)
    for zero in range(16):
        word = grid.word(spread, torch.full_like(spread, zero))
        assert (grid.zero(word) == zero).all()
        held = grid.spread(word)
        assert torch.equal((held * zero).to(torch.float16).float(), held * zero)
        normal = (spread > 2.0 ** -14) & (spread < 2.0 ** 10)
        assert ((held - spread).abs() <= spread / 128)[normal].all()
        assert torch.isfinite(held * 15).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_scales_leave_less_and_zero_points_pay_where_groups_are_off_centre(bits: int) -> None:
    importance = torch.rand(128, generator=torch.Generator().manual_seed(4)) + 0.1
    for shift in (0.0, 1.5):
        weight = weights(shift)

        def error(dense: torch.Tensor, weight: torch.Tensor = weight) -> float:
            return float(((dense - weight).square() * importance).sum())

        grid = ZeroGrid(bits, 32)
        plain, searched = (error(Nearest(grid, search).quantize(weight, importance).dequantized())
                           for search in (False, True))
        symmetric = error(to_integers(bits, 32).quantize(weight, importance).dequantized())
        assert searched < 0.97 * plain
        assert searched < (0.8 if shift else 1.1) * symmetric


@pytest.mark.parametrize("kept", [False, True])
def test_gptq_and_descent_keep_to_the_numbers_of_a_group(kept: bool) -> None:
    weight, generator = weights(1.0), torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 128, generator=generator) * torch.rand(128, generator=generator).exp()
    inputs += 0.5 * torch.randn(400, 1, generator=generator)
    hessian = (inputs.T @ inputs).double()
    mask = torch.rand(weight.shape, generator=generator) > 0.3 if kept else None
    target = weight if mask is None else weight * mask
    grid = ZeroGrid(3, 32, least=1)

    def loss(packed: ZeroWeight) -> float:
        return float(((packed.dequantized() - weight).double() @ hessian * (packed.dequantized() - weight)).sum())

    made = [GPTQ(3, 32, grid=grid, passes=passes).quantize(weight, hessian, kept=mask) for passes in (0, 3)]
    for packed in made:
        assert isinstance(packed, ZeroWeight)
        codes, scale, zero = packed.stored()
        assert codes.max() <= 7
        assert zero.min() >= 1
        again = (codes.float() - zero.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
        assert torch.equal(again, packed.dequantized())
        if mask is not None:
            assert not again[~mask].any()
    assert loss(made[1]) < loss(made[0]) < loss(Nearest(grid).quantize(target, hessian.diagonal()))


def test_zero_points_take_no_bytes_in_gptqs_files_and_are_read_as_written() -> None:
    form, other = WeightFormat(4, 32, storage=gptq.ZEROS.storage), WeightFormat(4, 32, storage=gptq.GPTQ.storage)
    assert gptq.ZEROS.tensors(24, 128, form, "float32", False) == gptq.GPTQ.tensors(24, 128, other, "float32", False)
    weight = torch.cat([weights(3.0), weights(0.0, 8).abs(), -weights(0.0, 8).abs()])[:32]
    made = codec_of(form).nearest(form, torch.float16, True).quantize(weight)
    leaves = codec_of(form).leaves(made, form)
    assert torch.equal(codec_of(other).decode(leaves, other, (32, 128), torch.float32), made.dequantized())


@pytest.mark.parametrize(("changes", "message"), [
    ([], "not held by the backend compressed-tensors: plain transformers loads no zero points .* gptq or gguf"),
    (["backend=quanto"], "weights.symmetric=false is not held by the backend quanto; set it to true"),
    (["backend=gptq", "weights.bits=8"], "weights.bits is 8, and gptq holds 2 or 3 or 4 bits"),
    (["backend=gptq", "weights.tune=5"], "weights with zero points in GPTQ's format are not tuned"),
    (["backend=gptq", "engine=vllm-cuda"], "vllm-cuda does not run weights with zero points in GPTQ's format")])
def test_refused_by_name(changes: list[str], message: str) -> None:
    decoder = Decoder.of(tiny_model("llama"))
    with pytest.raises(RequestError, match=message):
        make_plan(decoder.shape("tiny"), sink_map_of(decoder), Recipe().replace(
            ["weights.group_size=32", "weights.symmetric=false", *changes]))
