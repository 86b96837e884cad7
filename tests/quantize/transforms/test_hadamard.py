"""Rotations of any width: orthogonal, spreading, and blind to the mean where they have to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkquant.quantize.transforms.hadamard import Rotation, paley


@settings(max_examples=40)
@given(st.integers(1, 120), st.booleans(), st.integers(0, 2**40))
def test_it_is_orthogonal_and_keeps_the_ones_where_it_is_centred(width: int, centred: bool, seed: int) -> None:
    unit = torch.eye(width, dtype=torch.float64)
    rotation = Rotation(width, seed, centred)
    matrix = rotation.apply(unit)
    torch.testing.assert_close(matrix @ matrix.T, unit, rtol=0, atol=1e-12)
    x = torch.randn(3, width, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.rows(x), matrix.T @ x, rtol=0, atol=1e-12)
    if centred:
        torch.testing.assert_close(matrix.sum(0), torch.ones(width, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 16, 256, 12, 20, 28, 36, 60, 80, 96, 104, 704])
def test_entries_are_all_of_one_size_where_a_hadamard_matrix_is_known(width: int) -> None:
    matrix = Rotation(width, 3).apply(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs() * width**0.5, torch.ones_like(matrix), rtol=0, atol=1e-9)


def test_paley_has_no_matrix_where_his_constructions_do_not_reach() -> None:
    assert paley(92) is None
    assert paley(6) is None
    for order in (4, 12, 20, 36, 44):
        found = paley(order)
        assert found is not None
        assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


def test_another_seed_is_another_rotation_and_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(50, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Rotation(96, 1).apply(x), Rotation(96, 1).apply(x))
    assert not torch.allclose(Rotation(96, 1).apply(x), Rotation(96, 2).apply(x))
    x = x[:, :64]
    assert torch.equal(Rotation(64, 1).apply(x)[7:9], Rotation(64, 1).apply(x[7:9]))
