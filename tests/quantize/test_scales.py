"""The scale search against a fine grid in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sinkquant.schemes.codecs.integer_scales import searched_scales
from sinkquant.schemes.codecs.packed import group_scales, to_codes


def errors(weight: torch.Tensor, scale: torch.Tensor, bits: int, cost: torch.Tensor, size: int) -> torch.Tensor:
    """Weighted squared error of every group in float64, for scales [rows, groups]."""
    spread = scale.double().repeat_interleave(size, dim=1)
    codes = torch.clamp(torch.round(weight.double() / spread), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((codes * spread - weight.double()).square() * cost.double()).unflatten(1, (-1, size)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_scale_of_a_fine_grid_is_much_better(bits: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 64, generator=generator)
    cost = torch.rand(64, generator=generator) ** 4 * 100 if weighted else torch.ones(64)
    found = errors(weight, searched_scales(weight, bits, 32, torch.float16, cost if weighted else None), bits, cost, 32)
    reach = weight.abs().unflatten(1, (-1, 32)).amax(-1) / 2 ** (bits - 1)
    best = torch.stack([errors(weight, reach * share * sign, bits, cost, 32)
                        for share in torch.linspace(0.2, 2.5, 700).tolist() for sign in (1, -1)]).amin(0)
    assert found.sum() <= 1.05 * best.sum()
    assert found.sum() < errors(weight, group_scales(weight, bits, 32, torch.float16), bits, cost, 32).sum()


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 1000),
       size=st.sampled_from([8, 16, -1]), magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 3e4]))
def test_never_worse_than_the_range_and_always_storable(bits: int, dtype: torch.dtype, seed: int, size: int,
                                                        magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 16, generator=generator).clamp(-2, 2) * magnitude
    cost = torch.rand(16, generator=generator)
    scale = searched_scales(weight, bits, size, dtype, cost)
    assert scale.dtype == dtype
    assert scale.shape == (4, 1 if size == -1 else 16 // size)
    assert (scale != 0).all()
    columns = 16 if size == -1 else size
    plain = errors(weight, group_scales(weight, bits, size, dtype), bits, cost, columns)
    assert (errors(weight, scale, bits, cost, columns) <= plain * (1 + 1e-4) + 1e-30).all()
    assert torch.isfinite(to_codes(weight, scale, bits).to(dtype) * scale.repeat_interleave(columns, dim=1)).all()


def test_a_negative_scale_turns_the_longer_side_of_the_grid_to_the_larger_weights() -> None:
    weight = torch.tensor([[2.0, -1.0, 1.0, 0.0]])
    scale = searched_scales(weight, 2, -1, torch.bfloat16)
    assert scale.item() == -1.0
    assert torch.equal(to_codes(weight, scale, 2).float() * scale.float(), weight)


def test_columns_that_nothing_reads_are_rounded_as_if_all_were_read() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    cost = torch.cat([torch.ones(16), torch.zeros(16)])
    assert torch.equal(searched_scales(weight, 3, 16, torch.bfloat16, cost),
                       searched_scales(weight, 3, 16, torch.bfloat16))
