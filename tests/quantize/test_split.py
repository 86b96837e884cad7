"""Columns and single weights beside the codes, against float64."""

from __future__ import annotations

import pytest
import torch

from sinkquant.quantize import GPTQ, PackedWeight, to_integers
from sinkquant.quantize.refine import Offsets, rounding_offsets
from sinkquant.quantize.split import Split

ROWS, COLUMNS, KEPT = 24, 96, (3, 40, 41)
PLACES = ((5, 7), (20, 95))


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, Hessian and cross term (float64) of inputs in which the kept columns are massive in one token of ten."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) / 10
    inputs = torch.randn(400, COLUMNS, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(COLUMNS))
    inputs[::10, list(KEPT)] *= 50
    ideal = inputs + 0.3 * torch.randn(400, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    for row, column in PLACES:
        weight[row, column] = 30.0
    return weight, inputs.T @ inputs / 400, (ideal - inputs).T @ inputs / 400


def gptq(bits: int = 3, **more: object) -> GPTQ:
    return GPTQ(bits, 32, **more)  # type: ignore[arg-type]


def solve(method: GPTQ):  # type: ignore[no-untyped-def]
    return lambda weight, hessian, cross: method.quantize(weight, hessian, "w", cross)


def loss(packed: PackedWeight, weight: torch.Tensor, hessian: torch.Tensor, pull: torch.Tensor | None = None) -> float:
    error = packed.dequantized().double() - weight.double()
    linear = 0.0 if pull is None else float((error * pull).sum())
    return float(((error @ hessian) * error).sum()) - 2 * linear


def test_rounding_leaves_the_columns_as_they_are_and_out_of_every_range() -> None:
    weight, _, _ = problem()
    results = []
    for size in (1.0, 1000.0):
        larger = weight.clone()
        larger[:, list(KEPT)] *= size
        split = Split(KEPT, PLACES, torch.bfloat16, compensate=False)
        packed = split.quantize(larger, None, lambda w, h, _: to_integers(4, 32).quantize(w))
        dense = packed.dequantized()
        assert torch.equal(dense[:, list(KEPT)], larger[:, list(KEPT)].bfloat16().float())
        assert [float(dense[place]) for place in PLACES] == [30.0, 30.0]
        results.append(packed)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scale, results[1].scale)
    assert (results[0].codes[:, list(KEPT)] == 0).all()
    # The group of a super weight has the range of its other weights.
    assert results[0].scale.float().abs().max() < 30 / 7 / 2


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_exact_columns_are_the_best_there_are_for_the_codes(asymmetric: bool) -> None:
    weight, hessian, cross = problem(1)
    split = Split(KEPT, PLACES, torch.bfloat16, compensate=True, damping=1e-6)
    packed = split.quantize(weight, hessian, solve(gptq()), cross if asymmetric else None)
    assert packed.outliers is not None
    pull = 0.25 * weight.double() @ cross if asymmetric else torch.zeros_like(weight, dtype=torch.float64)
    kept = list(KEPT)
    free = packed.dequantized().double() - weight.double()
    free[:, kept] = 0
    best = torch.linalg.solve(hessian[kept][:, kept], (pull[:, kept] - free @ hessian[:, kept]).T).T
    found = packed.outliers.exact.double() - weight[:, kept].double()
    assert torch.allclose(found, best, atol=float(packed.outliers.exact.abs().max()) * 2**-8)
    assert (found.abs().max() > 0.01).item()


def best_real(weight: torch.Tensor, hessian: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """What minimizes the loss if weights could be any number: float64 [rows, columns]."""
    return weight.double() + torch.linalg.pinv(hessian, hermitian=True).matmul(pull.T).T


def test_a_method_without_rounding_error_ends_at_the_optimum_of_the_whole_loss() -> None:
    """Whatever the exact columns and the scalars pull the others by reaches the method as a shift of its weight."""
    weight, hessian, cross = problem(2)

    def ideal(target: torch.Tensor, metric: torch.Tensor | None, drawn: torch.Tensor | None) -> PackedWeight:
        assert metric is not None
        assert drawn is not None
        found = best_real(target, metric, 0.25 * target.double() @ drawn)
        return PackedWeight(found, torch.ones(ROWS, 1), 8)

    packed = Split(KEPT, PLACES, torch.float32, compensate=True, damping=1e-9).quantize(weight, hessian, ideal, cross)
    assert packed.outliers is not None
    pull = 0.25 * weight.double() @ cross
    best = best_real(weight, hessian, pull) - weight.double()
    assert loss(packed, weight, hessian, pull) == pytest.approx(-float((best * pull).sum()), rel=1e-4)
    assert (best.abs().max() > 0.1).item()


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_loses_less_with_its_sink_columns_exact(bits: int) -> None:
    weight, hessian, _ = problem(3)
    whole = gptq(bits).quantize(weight, hessian)
    split = Split(KEPT, PLACES, torch.bfloat16, True).quantize(weight, hessian, solve(gptq(bits)))
    assert loss(split, weight, hessian) < 0.4 * loss(whole, weight, hessian)


def test_exact_columns_that_the_others_go_along_with_make_up_for_their_error() -> None:
    weight, hessian, _ = problem(3)
    common = torch.ones(COLUMNS, 1, dtype=torch.float64)
    common[list(KEPT)] = 5
    hessian = hessian + 20 * common @ common.T
    losses = [loss(Split(KEPT, (), torch.bfloat16, compensate).quantize(weight, hessian, solve(gptq())), weight,
                   hessian) for compensate in (True, False)]
    assert losses[0] < 0.9 * losses[1]


def test_nothing_beside_is_plain_gptq() -> None:
    weight, hessian, _ = problem(4)
    packed = Split((), (), torch.bfloat16, True).quantize(weight, hessian, solve(gptq()))
    plain = gptq().quantize(weight, hessian)
    assert torch.equal(packed.codes, plain.codes)
    assert torch.equal(packed.scale, plain.scale)
    assert torch.equal(packed.dequantized(), plain.dequantized())


def test_tuning_moves_codes_but_none_of_the_exact_columns() -> None:
    weight, hessian, _ = problem(5)
    packed = Split(KEPT, PLACES, torch.bfloat16, True).quantize(weight, hessian, solve(gptq(2)))
    offsets = Offsets.of(packed, rounding_offsets(packed, weight))
    for _ in range(3):
        offsets.step(torch.full_like(weight, 100.0), 0.5)
    tuned = offsets.now()
    kept = list(KEPT)
    assert (tuned.codes[:, kept] == 0).all()
    assert (tuned.codes != packed.codes).any()
    assert torch.equal(tuned.dequantized()[:, kept], packed.dequantized()[:, kept])
