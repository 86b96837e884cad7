"""Inputs in FP4 are rounded as compressed-tensors rounds them, bit by bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from sinkquant.models.inputs import InputSwitch, RoundedInputs, input_args, static_scale


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp4_is_rounded_as_by_the_library(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 32, 256, generator=generator) * torch.rand(2, 32, 256, generator=generator) ** 4 * 8
    inputs[0, :4] = torch.arange(-128, 128) * 0.125  # every tie of the grid
    inputs[1, 0], inputs[1, 1] = 0, 1e-20
    inputs = inputs.to(dtype)
    over = torch.tensor([448 * 6 / 40.0]) if name == "nvfp4" else None
    args = input_args(name, "group")
    scale, zero_point = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Identity(), over)
    expected = fake_quantize(inputs, scale, zero_point, args, over)
    found = RoundedInputs(args, InputSwitch(), over).rounded(inputs)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_groups_of_inputs_larger_than_those_of_calibration_keep_their_precision() -> None:
    seen = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    args = input_args("nvfp4", "group")
    hook = RoundedInputs(args, InputSwitch(), static_scale(seen.min(), seen.max(), args, torch.float32))
    wanted = hook.rounded(seen)
    assert torch.equal(hook.rounded(seen * 4) / 4, wanted)
    assert not torch.equal(hook.rounded(seen * 8) / 8, wanted)
