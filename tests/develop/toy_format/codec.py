"""Weights in the toy format, and back: the second example of docs/develop/add-a-format.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from develop.toy_format.scheme import SHIFTS
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs import LibraryCodec, LibraryFiles

Leaves = dict[str, torch.Tensor]


class ToyFiles(LibraryFiles):
    """config.json says no more than the name."""

    backend = SHIFTS.backend

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        return {"quant_method": self.backend}

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        return {name.removesuffix(".codes"): WeightFormat(8, -1, storage=SHIFTS.storage)
                for name in stored if name.endswith(".codes")}


class ShiftCodec(LibraryCodec):
    """Every row is scaled by the smallest power of two that reaches its largest weight."""

    def encode(self, weight: torch.Tensor, form: WeightFormat) -> Leaves:
        reach = weight.float().abs().amax(1).clamp(min=2.0**-100)
        exponents = torch.ceil(torch.log2(reach / 127))
        codes = torch.round(weight.float() * torch.exp2(-exponents)[:, None])
        return {"codes": codes.to(torch.int8), "exponents": exponents.to(torch.int8)}

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return (leaves["codes"].float() * torch.exp2(leaves["exponents"].float())[:, None]).to(dtype)


SHIFT_CODEC = ShiftCodec(SHIFTS, ToyFiles())
