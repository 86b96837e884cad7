"""What states go through before they are packed: attention stays what it was, rounding does less harm."""

from __future__ import annotations

import pytest
import torch

from sinkquant.cache.grid import dequantize, quantize
from sinkquant.cache.store import PackedStates
from sinkquant.cache.transforms.covariance import balancing, flat, spreading
from sinkquant.cache.transforms.recoding import Recoding
from sinkquant.cache.transforms.rotation import Basis, Hadamard, Rotation

HEADS = 3


def _states(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """float32 [2, HEADS, tokens, width] whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS, width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(2, HEADS, tokens, width, generator=generator) @ mix / width**0.5


def _moments(states: torch.Tensor) -> torch.Tensor:
    flattened = states.double().transpose(0, 1).flatten(1, 2)
    return flattened.mT @ flattened


def _balanced(width: int) -> Basis:
    return Basis.of_matrix(balancing(_moments(_states(width, 200)), _moments(_states(width, 200, seed=1))))


@pytest.mark.parametrize("rotation", [Hadamard(), _balanced(16), _balanced(24)], ids=["hadamard", "16", "24"])
def test_attention_is_what_it_was(rotation: Rotation) -> None:
    width = rotation.matrix.shape[-1] if isinstance(rotation, Basis) else 16
    queries, keys = _states(width, 9, seed=2), _states(width, 40, seed=3)
    scores = rotation.query(queries) @ rotation.into(keys).mT
    assert torch.allclose(scores, queries @ keys.mT, rtol=1e-3, atol=1e-3)
    weights = torch.softmax(queries @ keys.mT, -1)
    assert torch.allclose(rotation.back(weights @ rotation.into(keys)), weights @ keys, rtol=1e-3, atol=1e-3)
    some = rotation.of([2, 0])
    assert torch.equal(some.into(keys[:, [2, 0]]), rotation.into(keys)[:, [2, 0]])


@pytest.mark.parametrize("width", [16, 24])
def test_balancing_makes_both_covariances_the_same_and_even(width: int) -> None:
    states, readers = _moments(_states(width, 500)), _moments(_states(width, 500, seed=1))
    matrix = balancing(states, readers)
    inverse = torch.linalg.inv(matrix)
    ours, theirs = matrix @ states @ matrix.mT, inverse.mT @ readers @ inverse
    assert torch.allclose(ours, theirs, rtol=0.05, atol=0.02 * float(ours.abs().max()))
    for covariance in (ours, theirs):
        sizes = covariance.diagonal(dim1=-2, dim2=-1)
        assert float((sizes.amax(-1) / sizes.amin(-1)).max()) < (1.1 if width == 16 else 1.7)
    assert torch.allclose(flat(width) @ flat(width).mT, torch.eye(width, dtype=torch.float64), atol=1e-6)


def test_a_head_that_the_text_never_used_keeps_its_channels() -> None:
    nothing = torch.zeros(1, 8, 8, dtype=torch.float64)
    for matrix in (balancing(nothing, nothing), spreading(nothing)):
        assert torch.allclose(matrix @ matrix.mT, torch.eye(8, dtype=torch.float64), atol=1e-5)


def _packed(keys: torch.Tensor, recoding: Recoding, counted: torch.Tensor | None = None) -> torch.Tensor:
    store = PackedStates([2] * HEADS, 32, None, False, recoding)
    store.append(keys, counted)
    return store.dense(torch.float32)


def test_balanced_keys_are_rounded_with_less_harm_to_scores() -> None:
    # A head's keys and queries are spread in directions of their own.
    turned = torch.linalg.qr(torch.randn(2, HEADS, 16, 16, generator=torch.Generator().manual_seed(0)))[0]
    queries, keys = (torch.randn(2, HEADS, 320, 16, generator=torch.Generator().manual_seed(1 + index))
                     * torch.logspace(-1, 1, 16) @ turned[index] for index in range(2))
    basis = Basis.of_matrix(balancing(_moments(keys), _moments(queries)))
    plain, rotated, balanced = (
        float((queries @ (_packed(keys, Recoding(rotation)) - keys).mT).square().mean())
        for rotation in (None, Hadamard(), basis))
    assert balanced < 0.75 * min(plain, rotated)


def test_tokens_of_unit_length_do_not_spoil_each_others_ranges() -> None:
    """A long key that is no detected sink, in a block with others (OScaR 2605.19660)."""
    keys = torch.randn(1, HEADS, 64, 16, generator=torch.Generator().manual_seed(0))
    keys[:, :, 7] *= 50
    others = torch.arange(64) != 7
    plain, scaled = ((_packed(keys, Recoding(scale_tokens=on)) - keys)[:, :, others].square().mean()
                     for on in (False, True))
    assert scaled < 0.3 * plain


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_cut_ranges_err_less_shrink_nothing_and_see_counted_tokens_only(group: int | None, symmetric: bool) -> None:
    x = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 1, 3, 64, 1, dtype=torch.bool)
    counted[0, 0, 1, 5] = False
    spoiled = x.clone()
    spoiled[0, :, 1, 5] = 1e4

    def rounded(states: torch.Tensor, clip: bool) -> torch.Tensor:
        found = dequantize(*quantize(states, counted, 2, group, symmetric, clip), 2, group, torch.float32)
        return found.masked_fill(~counted, 0.0)

    real = x.masked_fill(~counted, 0.0)
    whole, cut = rounded(x, False), rounded(x, True)
    assert ((cut - real).square().sum((-2, -1)) < 0.9 * (whole - real).square().sum((-2, -1))).all()
    # What is rounded keeps its size: its product with the true numbers is theirs with themselves.
    assert float((cut * real).sum() / real.square().sum()) == pytest.approx(1, abs=2e-3)
    assert torch.equal(cut, rounded(spoiled, True))


def test_a_group_of_equal_numbers_keeps_them() -> None:
    codes, scale, zero = quantize(torch.full((1, 1, 1, 32, 8), 3.25), None, 2, None, False, clip=True)
    assert torch.equal(dequantize(codes, scale, zero, 2, None, torch.float32), torch.full((1, 1, 1, 32, 8), 3.25))
