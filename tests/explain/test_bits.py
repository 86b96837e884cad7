"""Bits are told from the values alone, whatever the groups."""

from __future__ import annotations

import pytest
import torch

from sinkquant.explain.diagnose import bits_of


def rounded(bits: int, group: int, columns: int, even: bool = False) -> torch.Tensor:
    """Normal weights, or even ones, rounded to nearest with a scale per group, [64, columns]."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(64, columns, generator=draw) - 0.5 if even else torch.randn(64, columns, generator=draw)
    groups = weights.reshape(-1, group)
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).reshape(64, columns)


@pytest.mark.parametrize(("bits", "group", "columns"), [
    (3, 64, 576), (3, 64, 1536), (2, 32, 576), (4, 32, 1536), (4, 64, 512), (3, 128, 1536), (4, 1536, 1536),
    (8, 1536, 1536), (3, 576, 576), (4, 128, 4096)])
def test_bits_are_told_whatever_the_groups(bits: int, group: int, columns: int) -> None:
    assert bits_of(rounded(bits, group, columns)) == bits


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (2, 16), (3, 64), (4, 576)])
def test_bits_of_codes_that_are_used_evenly_are_told(bits: int, group: int) -> None:
    assert bits_of(rounded(bits, group, 576, even=True)) == bits


def test_unquantized_weights_have_none() -> None:
    assert bits_of(torch.randn(64, 576, generator=torch.Generator().manual_seed(0))) is None
