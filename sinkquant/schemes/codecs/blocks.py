"""Floating-point weights in blocks: compressed-tensors' tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.block_scales import E2M1, FP8_MAX, BlockGrid, BlockWeight
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Codes of 4 bits two to a byte, the first in its lower half: the sign, then the place in `E2M1`."""

    def fused_scale(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """So that the largest weight of all gets the largest FP8 scale where it becomes a 4, and room is left for it to
        become a 6 (arXiv 2512.02010): what engines divide the scales of blocks by."""
        largest = torch.stack([weight.abs().max() for weight in weights]).max().float().reshape(1)
        return (FP8_MAX * 4 / largest.clamp(min=2.0**-100)).cpu()

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> BlockGrid:
        """E2M1 or E4M3, and the scales of blocks."""
        assert (fused_scale is not None) == self.scheme.fused_scale
        return BlockGrid(form.bits, form.group_size or 0, fused_scale)

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """weight_packed uint8 [rows, columns / 2] or weight float8_e4m3fn, weight_scale [rows, blocks];
        weight_global_scale and input_global_scale, float32 [1], where there are such."""
        assert isinstance(weight, BlockWeight)
        codes = {"weight_packed": packed_pairs(weight.codes)} if weight.bits == 4 else {"weight": weight.codes}
        kind = torch.uint8 if weight.whole is None else torch.float8_e4m3fn
        whole = {} if weight.whole is None else {"weight_global_scale": weight.whole}
        inputs = {"input_global_scale": input_scale} if form.static_inputs and input_scale is not None else {}
        return codes | {"weight_scale": weight.scale.view(kind)} | whole | inputs

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, [rows, columns] in `dtype`."""
        codes = unpacked_pairs(leaves["weight_packed"]) if form.bits == 4 else leaves["weight"]
        scale = leaves["weight_scale"].view(torch.uint8)
        return BlockWeight(codes, scale, form.bits, whole=leaves.get("weight_global_scale")).dequantized(dtype)


def packed_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns / 2] from codes, int8 [rows, columns], twice the numbers of E2M1."""
    place = torch.zeros(E2M1[-1] + 1, dtype=torch.uint8, device=codes.device)
    place[list(E2M1)] = torch.arange(len(E2M1), dtype=torch.uint8, device=codes.device)
    bits = place[codes.abs().long()] | (codes < 0).to(torch.uint8) << 3
    return bits[:, ::2] | bits[:, 1::2] << 4


def unpacked_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The codes again, int8 [rows, columns]."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.int8, device=packed.device)
    return values[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
