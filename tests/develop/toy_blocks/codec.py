"""Four-bit floats in blocks: rounding to nearest under a scale that fused linears share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from develop.toy_blocks.scheme import BLOCK, BLOCKS
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs import Codec, LibraryFiles, PackedWeight, StoredWeight

Leaves = dict[str, torch.Tensor]
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What three bits of E2M1 stand for; the fourth is the sign."""


@dataclass(frozen=True)
class BlockWeight(PackedWeight):
    """codes: int8 [rows, columns], 0 to 15; scale: FP8 [rows, blocks]. fused_scale: float32 [1]."""

    fused_scale: torch.Tensor | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        assert self.fused_scale is not None
        values = LEVELS[self.codes.long() & 7] * torch.where(self.codes > 7, -1.0, 1.0)
        return (values * (self.scale.float() * self.fused_scale).repeat_interleave(BLOCK, 1)).to(dtype)

    def cpu(self) -> Self:
        return self


@dataclass(frozen=True)
class NearestBlocks:
    """The largest weight of a block gets the largest level."""

    fused_scale: torch.Tensor

    def quantize(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> BlockWeight:
        blocks = weight.float().unflatten(1, (-1, BLOCK)) / self.fused_scale
        scale = (blocks.abs().amax(-1) / 6).clamp(min=2.0**-9).to(torch.float8_e4m3fn)
        spread = (blocks / scale.float()[..., None]).flatten(1)
        codes = (spread.abs()[..., None] - LEVELS).abs().argmin(-1) + 8 * (spread < 0)
        return BlockWeight(codes.to(torch.int8), scale, 4, fused_scale=self.fused_scale)


class BlockFiles(LibraryFiles):
    """config.json says no more than the name."""

    backend = BLOCKS.backend

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        return {"quant_method": self.backend}

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        ending = ".weight_packed"
        return {name.removesuffix(ending): WeightFormat(4, BLOCK, BLOCKS.kind, storage=BLOCKS.storage)
                for name in stored if name.endswith(ending)}


class BlockCodec(Codec):
    """Two codes to a byte, the first in its lower half."""

    def fused_scale(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([weight.abs().max() for weight in weights]).max().float().reshape(1) / (6 * 448)

    def nearest(self, form: WeightFormat, scale_dtype: torch.dtype, scale_search: bool,
                fused_scale: torch.Tensor | None = None) -> NearestBlocks:
        assert fused_scale is not None
        return NearestBlocks(fused_scale)

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        assert isinstance(weight, BlockWeight)
        assert weight.fused_scale is not None
        codes = weight.codes.to(torch.uint8)
        return {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": weight.scale,
                "weight_global_scale": weight.fused_scale}

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        packed = leaves["weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
        weight = BlockWeight(codes, leaves["weight_scale"], 4, fused_scale=leaves["weight_global_scale"])
        return weight.dequantized(dtype)


BLOCK_CODEC = BlockCodec(BLOCKS, BlockFiles())
