"""Coordinate descent: lower loss in every row, optimal codes and scales in float64."""

from __future__ import annotations

import pytest
import torch

from sinkquant.quantize import GPTQ, descent, to_integers
from sinkquant.quantize.descent import descend


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [12, 160] and the Hessian of correlated inputs: more columns than one block of the descent."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(500, 160, generator=generator).double() @ (
        torch.randn(160, 160, generator=generator).double() / 12 + torch.eye(160))
    hessian = inputs.T @ inputs / 500
    return torch.randn(12, 160, generator=generator), hessian + 0.01 * torch.eye(160)


def losses(new: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor,
           pull: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of every row in float64."""
    difference = new.double() - weight.double()
    linear = 0 if pull is None else 2 * (difference * pull.double()).sum(1)
    return ((difference @ hessian) * difference).sum(1) - linear


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("pulled", [False, True])
def test_no_row_gets_worse_and_the_whole_gets_better_with_every_pass(bits: int, pulled: bool) -> None:
    weight, hessian = problem(bits)
    pull = 0.1 * torch.randn(12, 160, generator=torch.Generator().manual_seed(9)) if pulled else None
    packed = GPTQ(bits, 32, passes=0).quantize(weight, hessian)
    before = losses(packed.dequantized(), weight, hessian, pull)
    for passes in (1, 4):
        after = losses(descend(packed, weight, hessian, passes, pull=pull).dequantized(), weight, hessian, pull)
        assert (after <= before + 1e-4 * before.abs()).all()
        assert after.sum() < before.sum()
        before = after


def test_the_end_is_a_place_where_no_single_code_can_be_improved() -> None:
    weight, hessian = problem(0)
    packed = descend(to_integers(3, 32).quantize(weight), weight, hessian, 30)
    least = losses(packed.dequantized(), weight, hessian)
    for step in (-1, 1):
        for column in range(160):
            codes = packed.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(-4, 3)
            changed = codes.double() * packed.scale.double().repeat_interleave(32, dim=1)
            assert (losses(changed, weight, hessian) >= least - 1e-4 * least).all()


def test_scales_fit_their_codes() -> None:
    weight, hessian = problem(1)
    packed = descend(to_integers(2, 32).quantize(weight), weight, hessian, 30)
    least = losses(packed.dequantized(), weight, hessian)
    for group in range(5):
        for factor in (0.97, 1.03):
            scale = packed.scale.double().clone()
            scale[:, group] *= factor
            changed = packed.codes.double() * scale.repeat_interleave(32, dim=1)
            assert losses(changed, weight, hessian).sum() > least.sum()


def test_few_rows_at_a_time_where_groups_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved for the scales of a row has the square of its groups."""
    weight, hessian = problem(3)
    packed = to_integers(4, 4).quantize(weight)
    whole = descend(packed, weight, hessian, 2)
    solved: list[int] = []
    solve = torch.linalg.solve_ex
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda a, b: solved.append(a.numel()) or solve(a, b))
    monkeypatch.setattr(descent, "CHUNK", 5 * 40 ** 2)
    parts = descend(packed, weight, hessian, 2)
    assert max(solved) == 5 * 40 ** 2
    assert torch.equal(parts.codes, whole.codes)
    torch.testing.assert_close(parts.scale, whole.scale)


def test_groups_of_zeros_stay_zero() -> None:
    weight, hessian = problem(2)
    weight[:, 32:64] = 0
    metric = torch.block_diag(hessian[:32, :32], torch.eye(32).double(), hessian[64:, 64:])
    packed = descend(to_integers(4, 32).quantize(weight), weight, metric, 2)
    assert not packed.codes[:, 32:64].any()
    assert torch.isfinite(packed.scale).all()
