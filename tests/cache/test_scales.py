"""Scales and zeros of 8 bits: how far they are from the float16 ones, and what that does to a block."""

from __future__ import annotations

import pytest
import torch

from sinkquant.cache.grid import dequantize, quantize, recoded
from sinkquant.cache.scales import SIDE, STEPS, narrowed, widened


def _states(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    channels = torch.linspace(1, spread, 64)
    return (torch.randn(2, 2, 3, 32, 64, generator=generator) + 3.0) * channels


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32])
def test_rounded_by_half_a_step_of_the_second_grid(group: int | None, symmetric: bool) -> None:
    _, scale, zero = quantize(_states(20.0), None, 2, group, symmetric)
    codes, zeros, ends = narrowed(scale, zero)
    assert (codes.dtype, ends.dtype) == (torch.uint8, torch.float16)
    assert ends.shape == (2, 2, 3, 1, 1 if symmetric else 2)
    wide, starts = widened(codes, zeros, ends)
    top = scale.double().amax((-2, -1), keepdim=True)
    assert ((wide.double() - scale.double()).abs() <= 0.501 * top / STEPS).all()
    assert wide.min() > 0
    if zero is not None:
        assert zeros is not None
        assert starts is not None
        size = zero.double().abs().amax((-2, -1), keepdim=True)
        assert ((starts.double() - zero.double()).abs() <= 0.501 * size / SIDE).all()


@pytest.mark.parametrize("group", [None, 32])
def test_costs_next_to_nothing_where_channels_are_alike(group: int | None) -> None:
    x = _states()
    codes, scale, zero = quantize(x, None, 2, group, False)
    wide = (dequantize(codes, scale, zero, 2, group, torch.float32) - x).square().mean()
    steps, starts = widened(*narrowed(scale, zero))
    again = recoded(x, steps, starts, 2, group)
    assert int(again.max()) == 3
    narrow = (dequantize(again, steps, starts, 2, group, torch.float32) - x).square().mean()
    assert narrow < 1.02 * wide


def test_a_block_of_nothing_stays_nothing() -> None:
    codes, zeros, ends = narrowed(torch.full((1, 1, 1, 1, 64), 2.0**-24).half(), torch.zeros(1, 1, 1, 1, 64).half())
    steps, starts = widened(codes, zeros, ends)
    assert starts is not None
    assert torch.equal(starts, torch.zeros_like(starts))
    assert torch.isfinite(steps).all()
