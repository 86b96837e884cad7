"""Grids against a float64 reference: half a step at most, exact tokens out of the ranges."""

from __future__ import annotations

import pytest
import torch

from sinkquant.cache.grid import dequantize, quantize
from sinkquant.cache.hadamard import rotate


def _states(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(2, 2, 3, 32, 64, generator=generator) + 3.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_error_is_half_a_step(bits: int, group: int | None, symmetric: bool) -> None:
    x = _states()
    codes, scale, zero = quantize(x, None, bits, group, symmetric)
    assert scale.dtype == torch.float16
    assert (zero is None) == symmetric
    found = dequantize(codes, scale, zero, bits, group, torch.float32).double()
    step = scale.double() if group is None else scale.double().repeat_interleave(group, dim=-1)
    # The ends of the range may lie outside by the rounding of scale and zero to 16 bits.
    slack = 2.0**-11 * (x.double().abs() + (2**bits - 1) * step) + 1e-6
    assert ((found - x.double()).abs() <= 0.5 * step + slack).all()


@pytest.mark.parametrize("group", [None, 32])
def test_grid_is_the_reference(group: int | None) -> None:
    x = _states(1)
    codes, scale, zero = quantize(x, None, 2, group, False)
    reference = x.double() if group is None else x.double().unflatten(-1, (-1, group))
    low, high = ((reference.amin(-2, keepdim=True), reference.amax(-2, keepdim=True)) if group is None
                 else (reference.amin(-1), reference.amax(-1)))
    assert zero is not None
    assert torch.allclose(zero.double(), low, rtol=2**-10)
    assert torch.allclose(scale.double(), (high - low) / 3, rtol=4 * 2**-10)
    assert int(codes.max()) == 3
    assert int(codes.min()) == 0


@pytest.mark.parametrize("group", [None, 32])
def test_tokens_that_do_not_count_leave_the_ranges(group: int | None) -> None:
    x = _states(2)
    counted = torch.ones(2, 1, 3, 32, 1, dtype=torch.bool)
    counted[0, 0, 1, 5] = False
    spoiled = x.clone()
    spoiled[0, :, 1, 5] = 1e4
    expected, scale, zero = quantize(x, counted, 3, group, False)
    codes, spoiled_scale, spoiled_zero = quantize(spoiled, counted, 3, group, False)
    keep = counted.expand_as(codes)
    assert torch.equal(expected[keep], codes[keep])
    assert zero is not None
    assert spoiled_zero is not None
    if group is None:
        assert torch.equal(scale, spoiled_scale)
        assert torch.equal(zero, spoiled_zero)
    assert torch.isfinite(spoiled_scale).all()


def test_a_group_without_a_token_that_counts_is_finite() -> None:
    x = _states(3)
    codes, scale, zero = quantize(x, torch.zeros(2, 1, 3, 32, 1, dtype=torch.bool), 2, None, False)
    assert torch.isfinite(dequantize(codes, scale, zero, 2, None, torch.float32)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 65504.0])
def test_constant_states_come_back(value: float) -> None:
    x = torch.full((1, 1, 1, 32, 32), value)
    codes, scale, zero = quantize(x, None, 2, None, False)
    assert torch.allclose(dequantize(codes, scale, zero, 2, None, torch.float32), x, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 16, 128])
def test_rotation_is_orthonormal_and_its_own_inverse(width: int) -> None:
    matrix = rotate(torch.eye(width, dtype=torch.float32)).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(matrix, matrix.T, atol=1e-6)
