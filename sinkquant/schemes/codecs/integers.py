"""compressed-tensors' integers, in dense words or a byte each, with what stands beside the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import PackedWeight, pack, unpack
from sinkquant.schemes.integers import bytewise


@dataclass(frozen=True)
class IntegerCodec(Codec):
    """What vLLM and plain transformers load; sinkquant alone where anything stands beside the codes."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """weight_packed int32 [rows, words], weight_scale [rows, groups], weight_shape int64 [2]; or weight int8
        [rows, columns] and weight_scale. input_scale [1] where it is static."""
        assert isinstance(weight, PackedWeight)
        inputs = {"input_scale": input_scale} if form.static_inputs and input_scale is not None else {}
        if bytewise(form):
            return {"weight": weight.codes, "weight_scale": weight.scale} | inputs
        beside = {} if weight.outliers is None else weight.outliers.tensors()
        return {"weight_packed": pack(weight.codes, weight.bits), "weight_scale": weight.scale,
                "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64), **beside} | inputs

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, and what stands beside it, [rows, columns] in `dtype`."""
        scale = leaves["weight_scale"]
        codes = leaves["weight"] if bytewise(form) else unpack(leaves["weight_packed"], form.bits, shape[1])
        outliers = Outliers.of(dict(leaves), shape[0], scale.dtype)
        return PackedWeight(codes, scale, form.bits, outliers).dequantized(dtype)
