"""Linears on torch's kernels: against float64, a few tokens through the kernel and many through the dense weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinkquant.errors import RequestError, SinkquantError
from sinkquant.inference import KernelLinear, int4_on, kernel_for
from sinkquant.inference.int4_cpu import Int4CPU
from sinkquant.quantize import PackedWeight
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.outliers import Outliers

INT4 = Int4CPU.probe()
BFLOAT16 = 2**-8
"""Relative error in norm that rounding to bfloat16 leaves room for."""


def weight_of(bits: int, groups: int, rows: int = 90, columns: int = 192, beside: bool = False) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).bfloat16()
    if not beside:
        return PackedWeight(codes, scale, bits)
    kept = torch.tensor([3, 70], dtype=torch.int32)
    codes[:, kept.long()] = 0
    exact = torch.randn(rows, 2, generator=generator).bfloat16() * 4
    places, values = torch.tensor([[5, 9], [80, 100]], dtype=torch.int32), torch.tensor([30.0, -20.0]).bfloat16()
    return PackedWeight(codes, scale, bits, Outliers(kept, exact, places, values))


def reference(weight: PackedWeight, zeros: torch.Tensor | None) -> torch.Tensor:
    """The dense weight in float64."""
    width = weight.codes.shape[1] // weight.scale.shape[1]
    dense = weight.codes.double() * weight.scale.double().repeat_interleave(width, 1)
    if zeros is not None:
        dense += zeros.double().repeat_interleave(width, 1)
    if weight.outliers is not None:
        dense[:, weight.outliers.columns.long()] += weight.outliers.exact.double()
        at = weight.outliers.places.long()
        dense[at[:, 0], at[:, 1]] += weight.outliers.values.double()
    return dense


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64, 96, -1])
def test_products_are_those_of_the_dense_weight(bits: int, group: int) -> None:
    groups = 1 if group == -1 else 192 // group
    kernel = kernel_for(WeightFormat(bits, group), 192)
    assert not isinstance(kernel, str)
    draw = torch.Generator().manual_seed(0)
    for more in (False, True):
        weight = weight_of(bits, groups, beside=more)
        asymmetric = more and kernel.name == "int4"
        zeros = torch.randn(90, groups, generator=draw).bfloat16() * 0.1 if asymmetric else None
        bias = nn.Parameter(torch.randn(90, generator=draw).bfloat16(), requires_grad=False) if more else None
        linear = KernelLinear(weight, kernel, INT4, bias, zeros=zeros)
        dense = reference(weight, zeros)
        assert far(linear.weight, dense) < BFLOAT16
        for shape in ((192,), (3, 192), (2, 140, 192)):
            inputs = torch.randn(shape, generator=draw).bfloat16()
            expected = inputs.double() @ dense.T + (0 if bias is None else bias.double())
            found = linear(inputs)
            assert found.dtype == torch.bfloat16
            assert found.shape == expected.shape
            assert far(found, expected) < BFLOAT16


def test_inputs_with_a_large_mean_cost_two_planes_nothing() -> None:
    weight = weight_of(8, 3)
    kernel = kernel_for(WeightFormat(8, 64), 192)
    assert not isinstance(kernel, str)
    assert kernel.planes == 2
    inputs = (torch.randn(4, 192, generator=torch.Generator().manual_seed(0)) + 20).bfloat16()
    assert far(KernelLinear(weight, kernel, INT4)(inputs), inputs.double() @ reference(weight, None).T) < BFLOAT16


def test_one_copy_of_the_codes_is_in_memory() -> None:
    linear = KernelLinear(weight_of(4, 3, rows=96), kernel_for(WeightFormat(4, 64), 192), INT4)  # type: ignore[arg-type]
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 96 * 192 // 2 + 3 * 96 * 2 * 2
    assert not list(linear.parameters())


def test_a_conv1d_shows_its_weight_the_way_it_stores_it() -> None:
    weight = weight_of(4, 3)
    kernel = kernel_for(WeightFormat(4, 64), 192)
    assert not isinstance(kernel, str)
    linear = KernelLinear(weight, kernel, INT4, transposed=True)
    assert linear.weight.shape == (192, 90)


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 6))
def test_the_order_of_codes_is_undone(blocks: int, groups: int) -> None:
    codes = torch.randint(16, (16 * blocks, 32 * groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(INT4.unpack(INT4.pack(codes), len(codes)), codes)


@settings(max_examples=20)
@given(st.integers(1, 12), st.data())
def test_single_rows_are_read_from_where_they_lie(blocks: int, data: st.DataObject) -> None:
    rows = 16 * blocks
    codes = torch.randint(16, (rows, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(INT4.rows(INT4.pack(codes), wanted), codes[wanted])


def test_an_order_that_is_not_understood_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int4CPU.unpack

    def wrong(self: Int4CPU, *given: Any) -> torch.Tensor:
        return right(self, *given).flip(0)

    monkeypatch.setattr(Int4CPU, "unpack", wrong)
    with pytest.raises(SinkquantError, match="order that is not understood"):
        Int4CPU.probe()


@pytest.mark.parametrize(("form", "columns", "reason"), [
    (WeightFormat(4, 16), 64, "group size 16 is no multiple of 32"),
    (WeightFormat(3, 48), 96, "group size 48 is no multiple of 32"),
    (WeightFormat(8, -1), 40, "40 input columns are no multiple of 32"),
    (WeightFormat(8, -1, "float"), 64, "8-bit floating-point")])
def test_what_no_kernel_takes_has_a_reason(form: WeightFormat, columns: int, reason: str) -> None:
    found = kernel_for(form, columns)
    assert isinstance(found, str)
    assert reason in found


def test_a_device_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="torch sees none"):
        int4_on(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(RequestError, match=r"compute capability 8.0, and cuda has 7.5"):
        int4_on(torch.device("cuda"))


def test_predicted_bits_are_those_in_memory() -> None:
    for bits, group in ((3, 64), (4, -1), (6, 32), (8, -1)):
        kernel = kernel_for(WeightFormat(bits, group), 256)
        assert not isinstance(kernel, str)
        expected = 8 + 16 / 256 if kernel.name == "int8" else kernel.planes * (4 + 32 / kernel.group)
        weight = weight_of(bits, 1 if group == -1 else 256 // group, 64, 256)
        linear = KernelLinear(weight, kernel, INT4)
        assert sum(buffer.nbytes for buffer in linear.buffers()) * 8 == expected * 64 * 256


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_inputs_may_begin_anywhere_in_memory(bits: int) -> None:
    """As they do in a mapped file; torch's int8 kernel for AVX-512 ends the process where it meets such a tensor."""
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        octets = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
        start = -octets.data_ptr() % 64 + 4
        return octets[start:start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape).copy_(tensor)

    weight = weight_of(bits, 1)
    kernel = kernel_for(WeightFormat(bits, -1), 192)
    assert not isinstance(kernel, str)
    linear = KernelLinear(PackedWeight(moved(weight.codes), weight.scale, bits), kernel, INT4)
    for name, buffer in linear.named_buffers():
        linear.register_buffer(name, moved(buffer))  # as a loader that maps a file may put them there
    inputs = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = inputs.double() @ reference(weight, None).T
    assert far(linear(moved(inputs)), expected) < BFLOAT16
