"""What every way of loading a compressed-tensors checkpoint takes: what is refused, how inputs are rounded, and linears
that are plain again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from sinkquant.artifacts.kv_scheme import KVScheme
from sinkquant.errors import RequestError
from sinkquant.models.groups import require_no_transforms
from sinkquant.schemes.inputs import in_blocks
from sinkquant.schemes.json_object import read_object
from sinkquant.schemes.scheme import COMPRESSED


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: there is none in the file.
    """
    return read_object(path, "get the checkpoint again")


def check_readable(path: Path, settings: dict[str, Any]) -> None:
    """Dense weights and rounded inputs show no quantized outputs. Keys and values in FP8 are rounded by the hooks of
    compressed-tensors, which stay.

    Args:
        settings: the `quantization_config` of config.json.

    Raises:
        RequestError: the checkpoint has such, is in a format that is not read here, or has transforms that are left to
            be done while it runs.
    """
    method = settings.get("quant_method")
    if method not in COMPRESSED:
        raise RequestError(f"{path} is quantized in the {method} format, which is not read here; "
                           "give a compressed-tensors checkpoint or the unquantized model.")
    for name, group in (settings.get("config_groups") or {}).items():
        inputs = group.get("input_activations") or {}
        if group.get("output_activations"):
            raise RequestError(f"{path} quantizes what linears give (its {name}), which is not read here; "
                               "load it with transformers.")
        if inputs.get("strategy") not in (None, "token", "tensor") and not in_blocks(inputs):
            raise RequestError(f"{path} quantizes activations by {inputs['strategy']} (its {name}), which is not read "
                               "here; load it with transformers.")
    require_no_transforms(path, settings)
    cache = settings.get("kv_cache_scheme")
    if cache and not KVScheme.reads(cache):
        raise RequestError(f"{path} quantizes its KV cache in another way than FP8 with stored scales, which is not "
                           "read here; load it with transformers.")


@dataclass(frozen=True)
class InputRounding:
    """By module name: how inputs are rounded, and the stored scale and zero point of static ones."""

    args: dict[str, QuantizationArgs] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    zero_points: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, name: str, module: torch.nn.Module) -> None:
        """Put down how a linear that compressed-tensors made rounds its inputs."""
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            self.args[name] = scheme.input_activations
            for place, leaf in ((self.scales, "input_scale"), (self.scales, "input_global_scale"),
                                (self.zero_points, "input_zero_point")):
                if isinstance(found := getattr(module, leaf, None), torch.Tensor):
                    place[name] = found.detach().clone()


def plain(module: torch.nn.Linear | torch.nn.Embedding, name: str, inputs: InputRounding) -> None:
    """Take away what compressed-tensors leaves on a linear or an embedding, whose forward would round its dense
    weight once more, and put down how it rounds inputs."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise RequestError(f"{name} was not unpacked by compressed-tensors; install a newer version of it.")
    inputs.note(name, module)
    for leftover in ("weight_scale", "weight_shape", "weight_zero_point", "weight_packed", "input_scale",
                     "input_zero_point", "weight_global_scale", "input_global_scale"):
        module._parameters.pop(leftover, None)
        module._buffers.pop(leftover, None)
    for attribute in ("quantization_scheme", "quantization_status", "forward"):
        module.__dict__.pop(attribute, None)
