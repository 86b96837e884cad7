"""Floating-point blocks: the same numbers as compressed-tensors', and scales with the least error."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.blocks import MXFP4, MXFP8, NVFP4, Blocks
from sinkquant.schemes.codecs import codec_of
from sinkquant.schemes.codecs.block_scales import BlockGrid
from sinkquant.schemes.codecs.blocks import BlockCodec, BlockWeight

SCHEMES = pytest.mark.parametrize("scheme", [NVFP4, MXFP4, MXFP8], ids=lambda scheme: scheme.format)
FLOATS = pytest.mark.parametrize("scheme", [NVFP4, MXFP4], ids=lambda scheme: scheme.format)


def form_of(scheme: Blocks) -> WeightFormat:
    return WeightFormat(scheme.bits[0], scheme.group_size, "float", storage=scheme.storage)


def made(scheme: Blocks, weight: torch.Tensor, search: bool = True,
         importance: torch.Tensor | None = None) -> BlockWeight:
    codec = codec_of(form_of(scheme))
    assert isinstance(codec, BlockCodec)
    fused = codec.fused_scale([weight]) if scheme.fused_scale else None
    return codec.nearest(form_of(scheme), torch.bfloat16, search, fused).quantize(weight, importance)


def weights(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 128, generator=generator) * torch.rand(48, 1, generator=generator).mul_(spread).exp_()


def test_numbers_are_rounded_as_compressed_tensors_does() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 0.0, 1e9])
    numbers = torch.cat([ties, -ties, torch.randn(20000, generator=torch.Generator().manual_seed(1)) * 3])
    found = BlockGrid(4, 16).nearest_(numbers * 2) / 2
    assert torch.equal(found, cast_to_fp4(numbers.clone()))


@SCHEMES
def test_without_a_search_scales_are_those_of_compressed_tensors(scheme: Blocks) -> None:
    weight = weights(6.0)
    packed = made(scheme, weight, search=False)
    grouped = weight.unflatten(1, (-1, scheme.group_size or 0))
    args = QuantizationArgs(**scheme.arguments(form_of(scheme)))
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=packed.whole)
    expected = scales.float() if packed.whole is None else scales / packed.whole
    assert torch.equal(packed.spread() * (2 if packed.bits == 4 else 1), expected)


@SCHEMES
def test_a_decoded_weight_is_what_compressed_tensors_unpacks_and_float64_says(scheme: Blocks) -> None:
    packed, form = made(scheme, weights(6.0)), form_of(scheme)
    leaves = codec_of(form).leaves(packed, form)
    arguments = QuantizationArgs(**scheme.arguments(form))
    unpacker = BaseCompressor.get_value_from_registry(scheme.layout(form))
    theirs = unpacker.decompress(dict(leaves), QuantizationScheme(targets=["Linear"], weights=arguments))["weight"]
    assert torch.equal(packed.dequantized(torch.bfloat16), theirs)
    assert torch.equal(codec_of(form).decode(leaves, form, (48, 128), torch.bfloat16), theirs)
    scale = leaves["weight_scale"]
    exact = (2.0 ** (scale.double() - 127) if packed.whole is None else scale.double() / packed.whole.double())
    codes = packed.codes.double() / (2 if packed.bits == 4 else 1)
    exact = (codes.unflatten(1, (-1, form.group_size or 0)) * exact[..., None]).flatten(1)
    assert torch.allclose(packed.dequantized().double(), exact, rtol=3e-7, atol=0)


@FLOATS
def test_the_searched_scale_has_the_least_weighted_error_of_all(scheme: Blocks) -> None:
    weight, size = weights(), scheme.group_size or 0
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2)).mul_(6).exp_()
    packed = made(scheme, weight, importance=importance)

    def error(scale: torch.Tensor) -> torch.Tensor:
        grouped, spread = weight.double().unflatten(1, (-1, size)), packed.grid.spread(scale).double()[..., None]
        codes = packed.grid.nearest_((grouped / spread).float()).double()
        return ((codes * spread - grouped).square() * importance.double().reshape(-1, size)).sum(-1)

    # Every scale that can be stored is tried here, 126 and more of them.
    least = torch.stack([error(torch.full_like(packed.scale, byte)) for byte in range(4, 127 if packed.whole is not None
                                                                                      else 245)]).amin(0)
    found, reached = error(packed.scale), error(made(scheme, weight, search=False).scale)
    assert (found <= reached).all()
    assert found.sum() <= 1.01 * least.sum()
    assert found.sum() < 0.98 * reached.sum()


def test_the_largest_weight_may_become_a_4_or_a_6() -> None:
    """Four over six (arXiv 2512.02010): with 6 as the largest code, nothing stands between 4 and 6."""
    weight = torch.zeros(2, 16)
    weight[0, :4] = torch.tensor([4.0, 3.0, 3.0, 3.0])  # 4, 3, 3, 3 fit; 6, 4.5 do not
    weight[1, :4] = torch.tensor([6.0, 3.0, 2.0, 1.0])
    packed = made(NVFP4, weight)
    assert packed.codes[0, :4].tolist() == [8, 6, 6, 6]
    assert packed.codes[1, :4].tolist() == [12, 6, 4, 2]
    assert torch.allclose(packed.dequantized(), weight, rtol=0.05)


@SCHEMES
def test_scales_are_stored_and_read_without_loss_and_nothing_overflows(scheme: Blocks) -> None:
    weight = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 3e38), torch.full((1, 64), 1e-38), torch.randn(3, 64)])
    packed = made(scheme, weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(packed.dequantized(dtype)).all()
    assert not packed.dequantized()[0].any()
    assert torch.equal(packed.grid.storable(packed.spread()), packed.scale)
