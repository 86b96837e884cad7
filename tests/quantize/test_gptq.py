"""GPTQ and GPTAQ against a float64 reference that keeps the whole inverse Hessian."""

from __future__ import annotations

import pytest
import torch

from sinkquant.errors import SinkquantError
from sinkquant.quantize import GPTQ, to_integers
from sinkquant.schemes.codecs.packed import group_scales

ROWS, COLUMNS, DAMPING = 24, 48, 0.01


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [24, 48], correlated inputs [400, 48], and what the unquantized model would feed instead."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / 6 + torch.diag(
        torch.rand(COLUMNS, generator=generator) * 2)
    inputs = torch.randn(400, COLUMNS, generator=generator) @ mixing
    drifted = inputs + inputs @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 20
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs.double(), drifted.double()


def reference(weight: torch.Tensor, inputs: torch.Tensor, bits: int, group: int,
              fed: torch.Tensor | None = None, asymmetry: float = 0.0) -> torch.Tensor:
    """Optimal brain quantization, column by column from the left, by its definition: after a column is rounded its
    error is spread by the inverse of the Hessian of the columns that are left. With `fed`, the part of the drift that
    the column causes is projected on those columns' inputs. float64 [rows, columns]."""
    work = weight.double().clone()
    hessian = inputs.T @ inputs / len(inputs)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    result = torch.zeros_like(work)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for i in range(COLUMNS):
        if i % group == 0:
            scale = group_scales(work[:, i:i + group].float(), bits, -1, torch.bfloat16)[:, 0].double()
        column = work[:, i].clone()
        result[:, i] = torch.clamp(torch.round(column / scale), low, high) * scale
        left = torch.linalg.inv(damped[i:, i:])
        work[:, i:] -= ((column - result[:, i]) / left[0, 0])[:, None] * left[0]
        if fed is not None and i + 1 < COLUMNS:
            drift = (fed - inputs)[:, i] @ inputs / len(inputs)
            # Only what the columns to come can still do is asked of them.
            pull = torch.where(torch.arange(COLUMNS) > i, drift @ upper.T, 0.0) @ upper
            work[:, i + 1:] += asymmetry * column[:, None] * pull[i + 1:]
    return result


def loss(weight: torch.Tensor, new: torch.Tensor, inputs: torch.Tensor, fed: torch.Tensor | None = None) -> float:
    """Squared error of the layer's outputs."""
    target = (inputs if fed is None else fed) @ weight.double().T
    return float((target - inputs @ new.double().T).square().mean())


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 48), (2, 24)])
def test_codes_are_those_of_the_definition(bits: int, group: int) -> None:
    weight, inputs, _ = problem()
    method = GPTQ(bits, group, DAMPING, act_order=False, scale_search=False, passes=0)
    packed = method.quantize(weight, inputs.T @ inputs)
    expected = reference(weight, inputs, bits, group)
    # A float32 value a hair from the middle between two codes may fall to the other side.
    assert (packed.dequantized().double() - expected).abs().gt(1e-6).float().mean() < 0.01
    assert loss(weight, packed.dequantized(), inputs) == pytest.approx(loss(weight, expected, inputs), rel=0.01)


def test_asymmetric_calibration_is_that_of_the_definition() -> None:
    weight, inputs, fed = problem(1)
    cross = (fed - inputs).T @ inputs
    packed = GPTQ(4, 16, DAMPING, act_order=False, scale_search=False, asymmetry=1.0, passes=0).quantize(
        weight, inputs.T @ inputs, cross=cross)
    expected = reference(weight, inputs, 4, 16, fed, 1.0)
    assert (packed.dequantized().double() - expected).abs().gt(1e-6).float().mean() < 0.01


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_asymmetric_calibration_comes_nearer_to_what_the_unquantized_model_gives(bits: int) -> None:
    weight, inputs, fed = problem(2)
    hessian = inputs.T @ inputs
    plain = GPTQ(bits, 16).quantize(weight, hessian).dequantized()
    asymmetric = GPTQ(bits, 16, asymmetry=1.0).quantize(weight, hessian, cross=(fed - inputs).T @ inputs).dequantized()
    assert loss(weight, asymmetric, inputs, fed) < loss(weight, plain, inputs, fed)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_search_and_the_hessian_both_lower_the_loss(bits: int) -> None:
    weight, inputs, _ = problem(3)
    hessian = inputs.T @ inputs
    rounded, searched, plain, best = (loss(weight, packed.dequantized(), inputs) for packed in (
        to_integers(bits, 16, scale_search=False).quantize(weight),
        to_integers(bits, 16).quantize(weight, hessian.diagonal()),
        GPTQ(bits, 16, scale_search=False).quantize(weight, hessian), GPTQ(bits, 16).quantize(weight, hessian)))
    assert best < 0.9 * min(searched, plain)
    assert max(searched, plain) < rounded


@pytest.mark.parametrize("search", [False, True])
def test_the_scale_of_the_hessian_does_not_matter(search: bool) -> None:
    weight, inputs, _ = problem(4)
    small = GPTQ(3, 24, scale_search=search).quantize(weight, inputs.T @ inputs * 1e-12)
    large = GPTQ(3, 24, scale_search=search).quantize(weight, inputs.T @ inputs * 1e12)
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(small.scale, large.scale)


def test_columns_that_are_never_fed_are_rounded_as_if_alone() -> None:
    weight, inputs, _ = problem(5)
    packed = GPTQ(4, 16).quantize(weight, torch.zeros(COLUMNS, COLUMNS))
    assert torch.equal(packed.dequantized(), to_integers(4, 16).quantize(weight).dequantized())
    inputs[:, 32:] = 0
    packed = GPTQ(4, 16).quantize(weight, inputs.T @ inputs)
    assert torch.equal(packed.dequantized()[:, 32:], to_integers(4, 16).quantize(weight[:, 32:]).dequantized())


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    weight, inputs, _ = problem(6)
    with pytest.raises(SinkquantError, match="Hessian of layer"):
        GPTQ(4, 16).quantize(weight, inputs.T @ inputs * float("nan"), "layer")
