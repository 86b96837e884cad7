"""GPTQ's own format: what sinkquant's GPTQ found, as gptqmodel and vLLM read it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats.backends.base import kept_linears
from sinkquant.models.shards import StoredTensor
from sinkquant.quantize import BackendWeight, PackedWeight
from sinkquant.quantize.gptq_words import to_leaves
from sinkquant.schemes import WeightFormat

QWEIGHT = ".qweight"


@dataclass(frozen=True)
class GPTQFiles:
    """Symmetric, columns in their own order: codes and zeros as unsigned integers in int32 words, 16-bit scales."""

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Linears that are not packed are named for gptqmodel and vLLM (`dynamic`); where all blocks keep the same,
        also as optimum wants it (`modules_in_block_to_quantize`)."""
        ((bits, size),) = {(form.bits, form.group_size) for form in plan.formats.values()}
        kept = kept_linears(model, plan)
        found: dict[str, Any] = {
            "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, "lm_head": False,
            "checkpoint_format": "gptq", "damp_percent": plan.calibration.damping, "true_sequential": True,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept},
            "meta": {"quantizer": [f"sinkquant:{importlib.metadata.version('sinkquant')}"]}}
        blocks: dict[str, set[str]] = {}
        for name in plan.modules:
            block, _, leaf = _parts(name)
            blocks.setdefault(block, set()).update([leaf] if name in plan.formats else [])
        if len({frozenset(leaves) for leaves in blocks.values()}) == 1:
            found["modules_in_block_to_quantize"] = [sorted(next(iter(blocks.values())))]
        return found

    def write_more(self, folder: Path, plan: Plan) -> None:
        """Nothing more."""

    def leaves(self, weight: PackedWeight | BackendWeight) -> dict[str, torch.Tensor]:
        """qweight, qzeros, scales, g_idx."""
        assert isinstance(weight, PackedWeight)
        return to_leaves(weight)

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """One width for all."""
        bits = settings.get("bits")
        if bits not in (2, 3, 4, 8) or settings.get("checkpoint_format", "gptq") != "gptq":
            raise RequestError(f"{folder} holds GPTQ weights of {bits} bits in the format "
                               f"{settings.get('checkpoint_format')}, which is not read here.")
        return {key.removesuffix(QWEIGHT): WeightFormat(bits, int(settings.get("group_size", -1)), storage="gptq")
                for key in stored if key.endswith(QWEIGHT)}

    def reload(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Not run: it takes gptqmodel, which is never required."""
        return None


def _parts(name: str) -> tuple[str, str, str]:
    """"model.layers.3.mlp.up_proj" -> ("model.layers.3", "3", "mlp.up_proj")."""
    match = re.match(r"(.*?\.(\d+))\.(.*)", name)
    assert match is not None
    return match[1], match[2], match[3]
