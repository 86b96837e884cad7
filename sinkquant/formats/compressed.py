"""compressed-tensors' `pack-quantized` format: what vLLM and plain transformers load."""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.quantize import PackedWeight


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


def packed_state(model: PreTrainedModel, weights: dict[str, PackedWeight]) -> dict[str, torch.Tensor]:
    """The model's state dict with the weight of every packed linear replaced by its packed tensors."""
    state = dict(model.state_dict())
    for name, weight in weights.items():
        del state[f"{name}.weight"]
        state[f"{name}.weight_packed"] = pack_to_int32(weight.codes, weight.bits)
        state[f"{name}.weight_scale"] = weight.scale
        state[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
    return state
