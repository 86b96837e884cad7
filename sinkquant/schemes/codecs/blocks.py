"""Floating-point weights in blocks: rounding to nearest, and compressed-tensors' tensors of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.block_scales import E2M1, FP8_MAX, BlockGrid
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.packed import PackedWeight, row_chunks


@dataclass(frozen=True)
class BlockWeight(PackedWeight):
    """codes: int8 [rows, columns], twice the numbers of E2M1, or float8_e4m3fn; scale: bytes, uint8 [rows, blocks].
    whole: the scale of the whole tensor, float32 [1], or None."""

    whole: torch.Tensor | None = None

    @property
    def grid(self) -> BlockGrid:
        """What its codes are of."""
        return BlockGrid(self.bits, self.codes.shape[1] // self.scale.shape[1], self.whole)

    def spread(self) -> torch.Tensor:
        """What codes are multiplied with, float32 [rows, blocks]."""
        return self.grid.spread(self.scale)

    def cpu(self) -> Self:
        """The same in main memory."""
        return replace(super().cpu(), whole=None if self.whole is None else self.whole.cpu())


@dataclass(frozen=True)
class NearestInBlocks:
    """Every weight goes to the nearest code under the scale of its block."""

    grid: BlockGrid
    scale_search: bool = True

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> BlockWeight:
        """weight: float [rows, columns]; importance: [columns], the diagonal of the Hessian, or None."""
        kind = torch.int8 if self.grid.bits == 4 else torch.float8_e4m3fn
        codes, scales = torch.empty(weight.shape, dtype=kind, device=weight.device), []
        for rows in row_chunks(weight):
            part = weight[rows].float()
            scales.append(self.grid.scales(part, importance, self.scale_search))
            real = part.unflatten(1, (-1, self.grid.size)) / self.grid.spread(scales[-1])[..., None]
            codes[rows] = self.grid.nearest_(real).flatten(1).to(kind)
        return BlockWeight(codes, torch.cat(scales), self.grid.bits, whole=self.grid.whole)


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Codes of 4 bits two to a byte, the first in its lower half: the sign, then the place in `E2M1`."""

    def fused_scale(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """So that the largest weight of all gets the largest FP8 scale where it becomes a 4, and room is left for it to
        become a 6 (arXiv 2512.02010): what engines divide the scales of blocks by."""
        largest = torch.stack([weight.abs().max() for weight in weights]).max().float().reshape(1)
        return (FP8_MAX * 4 / largest.clamp(min=2.0**-100)).cpu()

    def nearest(self, form: WeightFormat, scale_dtype: torch.dtype, scale_search: bool,
                fused_scale: torch.Tensor | None = None) -> NearestInBlocks:
        """To the nearest floating-point number."""
        return NearestInBlocks(self.grid(form, fused_scale), scale_search)

    def grid(self, form: WeightFormat, fused_scale: torch.Tensor | None) -> BlockGrid:
        """The grid of a weight. fused_scale: as `fused_scale` gives it, in schemes that have one."""
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
