"""GPTQ with act-order against a float64 reference that factors nothing, and against rounding; scales as the textbook
take them, at the largest weight, and no descent afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import gptq, loss, visiting_order

from sinkquant.errors import SinkquantError
from sinkquant.quantize import GPTQ, PackedWeight, to_integers
from sinkquant.quantize.gptq import BLOCK


def problem(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs with a few loud columns; of rank `tokens` at most."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mix + torch.eye(columns))
    inputs *= torch.empty(columns, dtype=torch.float64).exponential_(generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / tokens


def metric(weight: torch.Tensor, packed: PackedWeight, hessian: torch.Tensor) -> float:
    return loss(weight.double().numpy(), packed.codes.double().numpy(), packed.scale.double().numpy(),
                hessian.numpy())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(96, 16), (96, -1), (160, 32), (BLOCK + 40, -1), (144, 48), (64, 64)])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_textbooks(bits: int, columns: int, group: int, act_order: bool) -> None:
    weight, hessian = problem(6, columns, 4 * columns, bits)
    packed = GPTQ(bits, group, 0.01, act_order, scale_search=False, passes=0).quantize(weight, hessian)
    codes, scales = gptq(weight.double().numpy(), hessian.numpy(), bits, group, 0.01, act_order, torch.bfloat16)
    # float32 and float64 may fall on two sides of a boundary now and then, and what follows then differs; the
    # result may not.
    assert (packed.codes.numpy() == codes).mean() > 0.98
    assert np.isclose(packed.scale.double().numpy(), scales, rtol=2**-7).mean() > 0.95
    reference = loss(weight.double().numpy(), codes, scales, hessian.numpy())
    assert metric(weight, packed, hessian) == pytest.approx(reference, rel=0.03)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_beats_rounding_in_the_hessians_metric(bits: int, group: int) -> None:
    weight, hessian = problem(16, 192, 400, bits)
    better = metric(weight, GPTQ(bits, group, scale_search=False, passes=0).quantize(weight, hessian), hessian)
    assert better < 0.95 * metric(weight, to_integers(bits, group, scale_search=False).quantize(weight), hessian)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), group=st.sampled_from([8, 16, 48, -1]),
       tokens=st.integers(1, 200))
def test_gptq_never_loses_much_to_rounding_whatever_the_rank(seed: int, bits: int, group: int, tokens: int) -> None:
    weight, hessian = problem(4, 48, tokens, seed)
    packed = GPTQ(bits, group, scale_search=False, passes=0).quantize(weight, hessian)
    assert torch.isfinite(packed.scale.float()).all()
    rounded = to_integers(bits, group, scale_search=False).quantize(weight)
    assert metric(weight, packed, hessian) <= 1.5 * metric(weight, rounded, hessian) + 1e-9


def test_a_hessian_of_low_rank_is_used_not_given_up() -> None:
    weight, hessian = problem(8, 96, 10)
    assert torch.linalg.matrix_rank(hessian) == 10
    packed = GPTQ(3, 32, scale_search=False, passes=0).quantize(weight, hessian)
    rounded = to_integers(3, 32, scale_search=False).quantize(weight)
    assert metric(weight, packed, hessian) < 0.3 * metric(weight, rounded, hessian)


def test_dead_columns_are_rounded_and_disturb_no_other() -> None:
    weight, hessian = problem(8, 64, 300)
    dead = torch.arange(5, 64, 9)
    hessian[dead] = 0
    hessian[:, dead] = 0
    packed = GPTQ(4, -1, act_order=True, scale_search=False, passes=0).quantize(weight, hessian)
    expected = to_nearest(weight, packed)
    assert torch.equal(packed.codes[:, dead], expected[:, dead])
    alive = [i for i in range(64) if i not in dead.tolist()]
    assert not torch.equal(packed.codes[:, alive], expected[:, alive])


def to_nearest(weight: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    top = 2 ** (packed.bits - 1)
    return (weight / packed.scale.float()).round().clamp(-top, top - 1).to(torch.int8)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = problem(8, 64, 10)
    hessian = torch.diag(torch.arange(1.0, 65.0, dtype=torch.float64))
    found = GPTQ(4, 16, scale_search=False, passes=0).quantize(weight, hessian)
    rounded = to_integers(4, 16, scale_search=False).quantize(weight)
    assert torch.equal(found.codes, rounded.codes)
    assert torch.equal(found.scale, rounded.scale)


def test_an_input_that_is_always_zero_is_rounded() -> None:
    weight, hessian = problem(8, 64, 10)
    assert torch.equal(GPTQ(4, 16, scale_search=False, passes=0).quantize(weight, torch.zeros_like(hessian)).codes,
                       to_integers(4, 16, scale_search=False).quantize(weight).codes)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e9, 1e30])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian = problem(8, 96, 200)
    plain = GPTQ(3, 32, scale_search=False, passes=0).quantize(weight, hessian)
    scaled = GPTQ(3, 32, scale_search=False, passes=0).quantize(weight, hessian * factor)
    assert (plain.codes == scaled.codes).float().mean() > 0.99
    assert metric(weight, scaled, hessian) == pytest.approx(metric(weight, plain, hessian), rel=0.02)


def test_more_damping_means_closer_to_rounding() -> None:
    weight, hessian = problem(16, 96, 200)
    rounded = to_integers(3, 32, scale_search=False).quantize(weight).codes
    found = [GPTQ(3, 32, damping, scale_search=False, passes=0).quantize(weight, hessian).codes
             for damping in (0.001, 0.1, 0.9)]
    changed = [(codes != rounded).float().mean() for codes in found]
    assert changed[0] > changed[1] > changed[2] > 0


@pytest.mark.parametrize("hessian", [-torch.eye(8).double() + torch.diag(torch.tensor([20.0] + [0.0] * 7)).double(),
                                     torch.ones(8, 8).double().fill_diagonal_(0.5)])
def test_a_hessian_that_is_not_positive_is_an_error_and_never_rounding(hessian: torch.Tensor) -> None:
    with pytest.raises(SinkquantError, match=r"the Hessian of mlp.up is singular with weights.damping 0.01; raise it"):
        GPTQ(4, -1, scale_search=False, passes=0).quantize(torch.randn(3, 8), hessian, "mlp.up")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_an_error(value: float) -> None:
    hessian = torch.eye(8).double()
    hessian[2, 3] = value
    with pytest.raises(SinkquantError, match=r"the Hessian of mlp.up is not finite"):
        GPTQ(4, -1, scale_search=False, passes=0).quantize(torch.randn(3, 8), hessian, "mlp.up")


def test_groups_are_visited_by_their_share_of_the_diagonal() -> None:
    diagonal = torch.tensor([1.0, 2.0, 9.0, 0.5, 3.0, 3.0], dtype=torch.float64)
    order = GPTQ(4, 2, scale_search=False, passes=0)._order(diagonal, 2).tolist()
    assert order == visiting_order(diagonal.numpy(), 2, True) == [2, 3, 4, 5, 1, 0]
    assert GPTQ(4, 2, act_order=False, scale_search=False, passes=0)._order(diagonal, 2).tolist() == list(range(6))
