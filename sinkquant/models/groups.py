"""What config.json of a compressed-tensors checkpoint says of its linears, and what of that is read here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinkquant.errors import RequestError
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes.scheme import COMPRESSED

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
           "mxfp8-quantized", "mixed-precision")
FOLDED = ("weight_input", "weight_output")
"""Places of compressed-tensors' transforms that are in the weights already."""


def groups_of(folder: Path, quantization: Any, stored: dict[str, StoredTensor]) -> dict[str, dict[str, Any]]:
    """Module name -> configuration group of every linear that is quantized in one of compressed-tensors' symmetric
    formats that sinkquant writes, or in sinkquant's own, which adds to them."""
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    settings = settings.get("quantization_config", settings)
    known = settings.get("quant_method") in COMPRESSED
    if not known or settings.get("format") not in FORMATS:
        raise RequestError(f"{folder} is quantized as {settings.get('quant_method')!r}; start from the unquantized "
                           "model.")
    require_no_transforms(folder, settings)
    targets = {target: group for group in settings["config_groups"].values() for target in group["targets"]}
    patterns = sorted(target for target in targets if target.startswith("re:"))
    found = {}
    for name in stored:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":
            # In the order of compressed-tensors, where several name it.
            naming = [module, *(one for one in patterns if re.match(one.removeprefix("re:"), module)), "Linear"]
            group = next((targets[one] for one in naming if one in targets), None)
            others = {f"{module}.weight_zero_point", f"{module}.weight_g_idx"}  # the second of actorder: group
            if group is None or others & stored.keys() or not _read_here(module, group, stored):
                raise RequestError(f"{folder} packs {module} in a way that sinkquant does not read; start from the "
                                   "unquantized model.")
            found[module] = group
    return found


def require_no_transforms(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with transforms that are left to be done while it runs.

    Args:
        settings: compressed-tensors' `quantization_config`.
    """
    for name, group in ((settings.get("transform_config") or {}).get("config_groups") or {}).items():
        online = [one["location"] for one in group.get("apply") or [] if one["location"] not in FOLDED]
        if online:
            raise RequestError(f"{folder} transforms what its linears compute with while it runs ({online[0]!r}, its "
                               f"{name}), which transformers leaves out without a word; load it with vLLM.")


def _read_here(module: str, group: dict[str, Any], stored: dict[str, StoredTensor]) -> bool:
    inputs = group.get("input_activations")
    if group["weights"].get("strategy") not in ("group", "channel", "tensor_group") or group.get("output_activations"):
        return False
    static = inputs is not None and inputs.get("dynamic") is not True
    return inputs is None or (inputs.get("symmetric", True) and inputs.get("strategy") in (
        "token", "tensor", "group", "tensor_group") and (not static or any(
            key in stored for key in input_scales(module))))


def input_scales(module: str) -> tuple[str, str]:
    """The names of a stored scale of inputs: of all, or over those of groups."""
    return f"{module}.input_scale", f"{module}.input_global_scale"
