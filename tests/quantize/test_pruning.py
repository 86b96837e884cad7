"""Pruning against float64 references that factor nothing, exact sparsity, and zeros that every later step keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_references import magnitude, sparsegpt, wanda

from sinkquant.errors import SinkquantError
from sinkquant.quantize import GPTQ, to_integers
from sinkquant.quantize.descent import descend
from sinkquant.quantize.pruning import Magnitude, SparseGPT, Wanda
from sinkquant.quantize.pruning.masks import least
from sinkquant.quantize.pruning.refine import refine

PATTERNS: list[tuple[float, tuple[int, int] | None]] = [(0.5, None), (0.5, (2, 4)), (0.3, None), (0.75, (1, 4)),
                                                        (0.5, (4, 8))]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs with a few loud columns."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ (mix + torch.eye(columns))
    inputs *= torch.empty(columns, dtype=torch.float64).exponential_(generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def loss(new: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = new.double() - weight.double()
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize(("sparsity", "group"), PATTERNS)
def test_wanda_is_the_papers(sparsity: float, group: tuple[int, int] | None) -> None:
    weight, hessian = problem(10, 160)
    found = Wanda(sparsity, group).prune(weight, hessian.diagonal())
    expected = wanda(weight.double().numpy(), np.diag(hessian.numpy()), sparsity, group)
    assert np.array_equal(found.weight.double().numpy(), expected)
    assert torch.equal(found.kept, found.weight != 0)


@pytest.mark.parametrize(("sparsity", "group"), PATTERNS)
def test_magnitude_is_the_textbooks(sparsity: float, group: tuple[int, int] | None) -> None:
    weight, _ = problem(10, 160)
    found = Magnitude(sparsity, group).prune(weight)
    assert np.array_equal(found.weight.double().numpy(), magnitude(weight.double().numpy(), sparsity, group))


@pytest.mark.parametrize("columns", [96, 200])
@pytest.mark.parametrize(("sparsity", "group"), PATTERNS)
def test_sparsegpt_is_the_papers(sparsity: float, group: tuple[int, int] | None, columns: int) -> None:
    columns = columns if group is None else columns // group[1] * group[1]
    weight, hessian = problem(10, columns, columns)
    found = SparseGPT(sparsity, group).prune(weight, hessian)
    expected = sparsegpt(weight.double().numpy(), hessian.numpy(), sparsity, group, 0.01)
    # float32 and float64 may order two scores differently now and then, and what follows then differs.
    assert (found.kept.numpy() == (expected != 0)).mean() > 0.995
    assert np.isclose(found.weight.double().numpy(), expected, atol=1e-4).mean() > 0.98
    assert loss(found.weight, weight, hessian) == pytest.approx(
        loss(torch.from_numpy(expected), weight, hessian), rel=0.01)


def test_each_method_beats_the_one_that_knows_less() -> None:
    weight, hessian = problem(16, 192)
    for group in (None, (2, 4)):
        small = loss(Magnitude(0.5, group).prune(weight).weight, weight, hessian)
        weighed = loss(Wanda(0.5, group).prune(weight, hessian.diagonal()).weight, weight, hessian)
        made_up = loss(SparseGPT(0.5, group).prune(weight, hessian).weight, weight, hessian)
        assert made_up < 0.8 * weighed < 0.8 * small


@pytest.mark.parametrize("group", [None, (2, 4)])
def test_descent_ends_where_no_weight_that_is_left_can_be_improved(group: tuple[int, int] | None) -> None:
    weight, hessian = problem(6, 160)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    pruned = SparseGPT(0.5, group).prune(weight, hessian)
    before = loss(pruned.weight, weight, damped)
    for passes in (1, 3, 200):
        refined = refine(pruned, weight, damped, passes)
        assert not refined.weight[~pruned.kept].any()
        after = loss(refined.weight, weight, damped)
        assert after < before
        before = after
    for row in range(6):  # the least squares of every row over the columns that it keeps
        kept = pruned.kept[row]
        best = torch.linalg.solve(damped[kept][:, kept], (damped @ weight[row].double())[kept])
        assert torch.allclose(refined.weight[row, kept].double(), best, atol=1e-3)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.sampled_from([8, 40, 136]),
       sparsity=st.floats(0.01, 0.99), flat=st.booleans())
def test_exactly_so_many_weights_go_without_a_pattern(seed: int, rows: int, columns: int, sparsity: float,
                                                      flat: bool) -> None:
    weight, hessian = problem(rows, columns, seed)
    if flat:  # ties everywhere
        weight, hessian = torch.ones(rows, columns), torch.eye(columns).double()
    kept = Magnitude(sparsity).prune(weight).kept
    assert int((~kept).sum()) == int(sparsity * rows * columns)
    kept = Wanda(sparsity).prune(weight, hessian.diagonal()).kept
    assert ((~kept).sum(1) == int(sparsity * columns)).all()
    kept = SparseGPT(sparsity).prune(weight, hessian).kept
    for block in kept.split(128, dim=1):
        assert int((~block).sum()) == int(sparsity * block.numel())


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), group=st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5)]),
       count=st.integers(1, 30), flat=st.booleans())
def test_every_group_of_a_pattern_keeps_exactly_n(seed: int, rows: int, group: tuple[int, int], count: int,
                                                  flat: bool) -> None:
    weight, hessian = problem(rows, count * group[1], seed)
    if flat:
        weight, hessian = torch.ones_like(weight), torch.eye(weight.shape[1]).double()
    for found in (Magnitude(0.5, group).prune(weight), Wanda(0.5, group).prune(weight, hessian.diagonal()),
                  SparseGPT(0.5, group).prune(weight, hessian)):
        assert (found.kept.unflatten(1, (-1, group[1])).sum(-1) == group[0]).all()
        assert not found.weight[~found.kept].any()


def test_of_equal_scores_the_first_go() -> None:
    assert least(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 3).tolist() == [[True, True, True, False]]
    assert not least(torch.ones(2, 3), 0).any()


@pytest.mark.parametrize("method", [Wanda(0.5), Wanda(0.5, (2, 4))])
def test_inputs_that_are_never_fed_or_of_any_size_leave_a_choice(method: Wanda) -> None:
    weight, hessian = problem(4, 32)
    nothing = method.prune(weight, torch.zeros(32))
    assert torch.equal(nothing.kept, method.prune(weight, torch.ones(32)).kept)
    for factor in (1e-30, 1e30):
        assert torch.equal(method.prune(weight, hessian.diagonal() * factor).kept,
                           method.prune(weight, hessian.diagonal()).kept)
    assert torch.equal(SparseGPT(0.5).prune(weight, torch.zeros(32, 32)).kept,
                       Magnitude(0.5).prune(weight).kept)


def test_a_hessian_that_is_not_finite_is_an_error() -> None:
    weight, hessian = problem(4, 32)
    with pytest.raises(SinkquantError, match=r"the Hessian of mlp\.up is not finite"):
        SparseGPT(0.5).prune(weight, hessian * float("nan"), "mlp.up")


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), group=st.sampled_from([16, 48, -1]),
       pattern=st.sampled_from([None, (2, 4)]), act_order=st.booleans(), asymmetric=st.booleans())
def test_zeros_stay_zero_through_every_quantizer(seed: int, bits: int, group: int, pattern: Any, act_order: bool,
                                                 asymmetric: bool) -> None:
    weight, hessian = problem(5, 48, seed)
    pruned = SparseGPT(0.5, pattern).prune(weight, hessian)
    assert not to_integers(bits, group).quantize(pruned.weight, hessian.diagonal()).codes[~pruned.kept].any()
    cross = 0.1 * hessian if asymmetric else None
    packed = GPTQ(bits, group, act_order=act_order).quantize(weight, hessian, cross=cross, kept=pruned.kept)
    assert not packed.codes[~pruned.kept].any()
    damped = hessian + 0.01 * torch.eye(48) * hessian.diagonal().mean()
    again = descend(packed, weight, damped, 2, kept=pruned.kept)
    assert not again.codes[~pruned.kept].any()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_gptq_makes_up_for_the_zeros_too(pattern: Any) -> None:
    weight, hessian = problem(16, 192)
    pruned = Wanda(0.5, pattern).prune(weight, hessian.diagonal())
    after = GPTQ(4, 32).quantize(pruned.weight, hessian, kept=pruned.kept)
    jointly = GPTQ(4, 32).quantize(weight, hessian, kept=pruned.kept)
    alone = GPTQ(4, 32, passes=0).quantize(weight, hessian, kept=pruned.kept)
    assert loss(jointly.dequantized(), weight, hessian) < 0.8 * loss(after.dequantized(), weight, hessian)
    assert loss(jointly.dequantized(), weight, hessian) < loss(alone.dequantized(), weight, hessian)


def test_a_mask_that_keeps_all_changes_nothing() -> None:
    weight, hessian = problem(8, 96)
    plain = GPTQ(3, 32).quantize(weight, hessian)
    masked = GPTQ(3, 32).quantize(weight, hessian, kept=torch.ones_like(weight, dtype=torch.bool))
    assert torch.equal(plain.codes, masked.codes)
    assert torch.equal(plain.scale, masked.scale)
