"""Every kind of block that is written: what the gguf package makes of its bytes, and GPTQ on a grid that is no line."""

from __future__ import annotations

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from sinkquant.quantize.gptq import GPTQ
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs import codec_of
from sinkquant.schemes.codecs.grid import Nearest, to_integers
from sinkquant.schemes.codecs.table_grid import IQ4_NL, TableGrid
from sinkquant.schemes.gguf import GGUF, Blocks

ROWS, COLUMNS = 24, 128
KINDS = [(scheme, bits) for scheme in GGUF if scheme.ends == "16-bit" for bits in scheme.bits]


def weights(shift: float = 0.0) -> torch.Tensor:
    """Groups of 32 whose middles differ by up to `shift` standard deviations."""
    generator = torch.Generator().manual_seed(3)
    middles = shift * torch.randn(ROWS, COLUMNS // 32, generator=generator).repeat_interleave(32, 1)
    return 0.02 * (torch.randn(ROWS, COLUMNS, generator=generator) + middles)


@pytest.mark.parametrize(("scheme", "bits"), KINDS, ids=[f"{s.kind_of(bits)} of {s.storage}" for s, bits in KINDS])
def test_the_gguf_package_reads_the_same_weights_bit_for_bit(scheme: Blocks, bits: int) -> None:
    form, weight = WeightFormat(bits, 64, storage=scheme.storage), weights(1.0)
    codec, kind = codec_of(form), GGMLQuantizationType[scheme.kind_of(bits).upper()]
    made = codec.nearest(form, torch.float16, True).quantize(weight)
    (packed,) = codec.leaves(made, form).values()
    values, size = GGML_QUANT_SIZES[kind]
    assert packed.shape == (ROWS, COLUMNS // values * size)
    theirs = torch.from_numpy(dequantize(packed.numpy(), kind))
    assert torch.equal(theirs, made.dequantized())
    assert made.codes.unique().numel() > 0.8 * 2 ** bits  # all of the codes are in use
    if kind is not GGMLQuantizationType.IQ4_NL:  # whose rounding the package does not have
        form = WeightFormat(bits, 32, storage=scheme.storage)
        found = codec.nearest(form, torch.float16, True).quantize(weight).dequantized()
        other = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
        assert (found - weight).square().sum() < (other - weight).square().sum()


def test_closer_numbers_around_zero_leave_less() -> None:
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(4)) + 0.1
    weight, grid = weights(), TableGrid(IQ4_NL, 32)

    def error(dense: torch.Tensor) -> float:
        return float(((dense - weight).square() * importance).sum())

    plain, searched = (error(Nearest(grid, search).quantize(weight, importance).dequantized())
                       for search in (False, True))
    assert searched < 0.97 * plain
    assert searched < 0.9 * error(to_integers(4, 32, torch.float16).quantize(weight, importance).dequantized())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_of_a_group_is_not_clipped(sign: int) -> None:
    weight = sign * torch.linspace(-0.3, 1, 32)[None]
    packed = Nearest(TableGrid(IQ4_NL, 32), False).quantize(weight)
    assert packed.codes[0, -1] == -127  # the table ends at 113
    assert float(packed.dequantized()[0, -1]) == pytest.approx(sign, rel=1e-3)


def test_gptq_and_descent_keep_to_the_table() -> None:
    weight, generator = weights(), torch.Generator().manual_seed(5)
    inputs = torch.randn(400, COLUMNS, generator=generator) + 0.5 * torch.randn(400, 1, generator=generator)
    hessian, grid = (inputs.T @ inputs).double(), TableGrid(IQ4_NL, 32)

    def loss(dense: torch.Tensor) -> float:
        return float(((dense - weight).double() @ hessian * (dense - weight)).sum())

    solved = [GPTQ(4, 32, grid=grid, passes=passes).quantize(weight, hessian) for passes in (0, 3)]
    for packed in solved:
        assert torch.isin(packed.codes, torch.tensor(IQ4_NL, dtype=torch.int8)).all()
        assert packed.scale.dtype == torch.float16
    nearest = Nearest(grid, True).quantize(weight, hessian.diagonal())
    assert loss(solved[1].dequantized()) < loss(solved[0].dequantized()) < loss(nearest.dequantized())
