"""compressed-tensors' `pack-quantized` format: what vLLM and plain transformers load."""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.quantize import PackedWeight, row_chunks


def quantization_config(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per format, every other linear ignored by name."""
    formats: dict[tuple[int, int], list[str]] = {}
    for name, decision in plan.modules.items():
        if decision.bits < 16 and decision.group_size is not None:
            formats.setdefault((decision.bits, decision.group_size), []).append(name)
    groups = {}
    for index, ((bits, size), names) in enumerate(sorted(formats.items())):
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                                   "strategy": "channel" if size == -1 else "group",
                                   "group_size": None if size == -1 else size}
        groups[f"group_{index}"] = {"targets": [f"re:^{re.escape(name)}$" for name in names], "weights": weights,
                                    "input_activations": None, "output_activations": None,
                                    "format": "pack-quantized"}
    packed = {name for names in formats.values() for name in names}
    ignore = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and name not in packed]
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None}


def packed_linear(name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
    """The three tensors that a packed linear becomes."""
    return {f"{name}.weight_packed": pack(weight.codes, weight.bits), f"{name}.weight_scale": weight.scale,
            f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64)}


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack_to_int32` of compressed-tensors gives, int32 [rows, words], several times as fast where a word holds
    whole codes. codes: int8 [rows, columns]."""
    rows, columns = codes.shape
    if bits not in (2, 4, 8) or columns % 16:
        return torch.cat([pack_to_int32(codes[part], bits) for part in row_chunks(codes)])
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    short = {2: torch.int16, 4: torch.int32, 8: torch.int64}[bits]
    for part in row_chunks(codes):
        eight = (codes[part].contiguous().view(torch.uint8) + 2 ** (bits - 1)).view(torch.int64)
        field, used = 8, bits
        while used < field < 64:  # close the gap between two fields: they become one of twice the width
            kept = sum(((1 << 2 * used) - 1) << start for start in range(0, 64, 2 * field))
            eight = (eight | eight >> (field - used)) & kept
            field, used = 2 * field, 2 * used
        words[part] = eight.view(short)[:, ::64 // (8 * bits)].contiguous().view(torch.int32)
    return words
