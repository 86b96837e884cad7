"""RTN and the number format, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from references import rtn

from sinkquant.quantize import to_integers
from sinkquant.schemes.codecs.packed import group_scales, to_codes

STORES = [torch.bfloat16, torch.float16]


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 10 ** torch.empty(rows, 1).uniform_(
        -3, 1, generator=generator)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("group", [-1, 1, 16, 48])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_is_the_textbooks(bits: int, group: int, store: torch.dtype) -> None:
    weight = random_weight(24, 96, bits)
    packed = to_integers(bits, group, store, scale_search=False).quantize(weight)
    codes, scales = rtn(weight.double().numpy(), bits, group, store)
    assert np.array_equal(packed.codes.numpy(), codes)
    assert np.array_equal(packed.scale.double().numpy(), scales)
    assert packed.scale.dtype == store
    exact = codes * np.repeat(scales, 96 // scales.shape[1], axis=1)
    assert np.array_equal(packed.dequantized().double().numpy(), exact)
    packing = pack_to_int32(packed.codes, bits)
    assert torch.equal(unpack_from_int32(packing, bits, torch.Size(weight.shape)), packed.codes)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 10**6), exponent=st.floats(-12, 12))
def test_no_weight_moves_by_more_than_half_a_step_but_the_largest(bits: int, seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 32, generator=generator, dtype=torch.float64) * 10.0**exponent
    packed = to_integers(bits, 16, torch.bfloat16, scale_search=False).quantize(weight.float())
    step = packed.scale.double().repeat_interleave(16, dim=1)
    error = (packed.dequantized().double() - weight).abs()
    # The grid is one code short on the positive side, and its scale is rounded to bfloat16 (2^-9).
    inside = weight.abs() <= step * (2 ** (bits - 1) - 1)
    assert (error[inside] <= step[inside] * (0.5 + 1e-6)).all()
    assert (error <= step * (0.5 + 2 ** (bits - 1) / 256 + 1e-6)).all()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_zeros_and_constant_groups_stay_what_they_are(bits: int, store: torch.dtype) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = -0.5
    weight[2, :32] = 0.25
    packed = to_integers(bits, 32, store, scale_search=False).quantize(weight)
    new = packed.dequantized()
    assert (new[0] == 0).all()
    assert (new[2, 32:] == 0).all()
    assert torch.isfinite(packed.scale.float()).all()
    assert (packed.scale > 0).all()
    assert torch.allclose(new[1], weight[1], rtol=0.5 / (2 ** (bits - 1) - 0.5) + 0.01)
    assert len(new[1].unique()) == 1


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_float16_weights_do_not_overflow(bits: int, search: bool) -> None:
    largest = torch.finfo(torch.float16).max
    weight = torch.tensor([[largest, -largest, 1.0, 0.0], [-largest, -largest, largest / 2, largest]]).half()
    packed = to_integers(bits, -1, torch.float16, scale_search=search).quantize(weight)
    assert torch.isfinite(packed.scale.float()).all()
    assert torch.isfinite(packed.dequantized(torch.float16).float()).all()
    assert (packed.dequantized()[:, 1] < -0.6 * largest).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_whose_scales_are_subnormal_in_float16_are_kept(bits: int) -> None:
    weight = random_weight(8, 32, 3).clamp(-1, 1) * 1e-3
    packed = to_integers(bits, 32, torch.float16, scale_search=False).quantize(weight)
    normal = to_integers(bits, 32, torch.bfloat16, scale_search=False).quantize(weight)

    def error(found: torch.Tensor) -> float:
        return float((found - weight).square().sum() / weight.square().sum())

    assert error(packed.dequantized()) < 1.1 * error(normal.dequantized()) + 1e-4


def test_scales_are_taken_and_spread_by_group() -> None:
    weight = torch.tensor([[1.0, -2.0, 30.0, 0.5]])
    scale = group_scales(weight, 4, 2, torch.bfloat16)
    assert scale.shape == (1, 2)
    assert torch.allclose(scale.float(), torch.tensor([[2.0, 30.0]]) / 7.5, rtol=2**-8)
    assert to_codes(weight, scale, 4).tolist() == [[4, -7, 7, 0]] or to_codes(weight, scale, 4)[0, 2] == 7
