"""Where end-to-end tuning starts from, on disk beside a checkpoint that grows: a run that was killed begins there."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sinkquant.quantize import Outliers, PackedWeight, QuantizedBlock, TuningStart
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.registry import codec_of

FOLDER = "distill"


@dataclass(frozen=True)
class Scratch:
    """One file per block in a folder of the checkpoint's own, which goes before the checkpoint is complete."""

    partial: Path

    def keep(self, block: QuantizedBlock) -> None:
        """Write down what a block's linears start from. A block may come in parts, of which one has all that are
        tuned."""
        folder = self.partial / FOLDER
        path = folder / f"{block.index}.safetensors"
        if not block.offsets and path.is_file():
            return
        folder.mkdir(exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, offsets in block.offsets.items():
            packed = block.weights[name]
            assert isinstance(packed, PackedWeight)
            parts = {"codes": packed.codes, "scale": packed.scale}
            whole = getattr(packed, "whole", None)  # of formats with a scale of the whole tensor, which linears share
            parts |= {leaf: one for leaf, one in (("offsets", offsets), ("whole", whole)) if one is not None}
            parts |= {} if packed.outliers is None else packed.outliers.tensors()
            tensors |= {f"{name}:{leaf}": tensor.contiguous().clone() if leaf == "whole" else tensor.contiguous()
                        for leaf, tensor in parts.items()}
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def starts(self, blocks: int, formats: dict[str, WeightFormat]) -> dict[str, TuningStart]:
        """Module name -> where it starts from, over all blocks.

        Args:
            formats: of every linear, as planned.
        """
        found = {}
        for index in range(blocks):
            parts: dict[str, dict[str, Any]] = {}
            for key, tensor in load_file(self.partial / FOLDER / f"{index}.safetensors").items():
                name, _, leaf = key.rpartition(":")
                parts.setdefault(name, {})[leaf] = tensor
            for name, part in sorted(parts.items()):
                scale, form = part["scale"], formats[name]
                packed = codec_of(form).grid(form, scale.dtype, part.get("whole")).weight(part["codes"], scale)
                packed = replace(packed, outliers=Outliers.of(part, len(packed.codes), scale.dtype))
                found[name] = TuningStart(packed, part.get("offsets"))
        return found

    def clear(self) -> None:
        """Take it away."""
        shutil.rmtree(self.partial / FOLDER, ignore_errors=True)
