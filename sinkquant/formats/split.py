"""compressed-tensors checkpoints of mixtures, read with every projection of a packed expert as a linear of its own.

transformers unpacks experts while it loads them and stacks them to dense tensors. Where it finds linears instead, it
loads packed ones into them as into any other, so that no packed expert is dense at any time. `import sinkquant`
registers this way of loading with transformers; only `load_packed` asks for it, no checkpoint names it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.utils.match import is_match
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from sinkquant.inference.experts import split_experts
from sinkquant.models.experts import ExpertLinear, expert_linears, fused_parameters, made_by
from sinkquant.models.loading import read_config
from sinkquant.schemes import DEFAULT_BACKEND

METHOD = "compressed-tensors-split"
LAYER = re.compile(r".*?\.\d+(?=\.)")
"""What the name of a parameter begins with."""


def split_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a quantized checkpoint, which asks for split experts if it is compressed-tensors'."""
    config = read_config(path, trust_remote_code)
    if config.quantization_config["quant_method"] == DEFAULT_BACKEND:
        config.quantization_config = config.quantization_config | {"quant_method": METHOD}
    return config


@register_quantization_config(METHOD)
class SplitConfig(CompressedTensorsConfig):
    """The same settings under another name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"quant_method": "compressed-tensors"})
        self.quant_method = METHOD


@register_quantizer(METHOD)
class SplitQuantizer(CompressedTensorsHfQuantizer):
    """Splits a layer's experts, where the configuration names any, before compressed-tensors looks for its linears."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **others: Any) -> None:
        parts = expert_linears(model)
        self.told_apart = {part.parameter for part in parts.values()}
        split_experts(model, self._packed(parts))
        super()._process_model_before_weight_loading(model, **others)

    def _packed(self, parts: Mapping[str, ExpertLinear]) -> dict[str, ExpertLinear]:
        """The experts of the layers in which any is packed."""
        settings, linear = self.compressor.quantization_config, nn.Linear(1, 1, device="meta")
        targets = [target for group in settings.config_groups.values() for target in group.targets] if settings else []
        owners: set[str] = set()
        for name, part in parts.items():
            if part.owner not in owners and is_match(name, linear, targets, settings.ignore or []):
                owners.add(part.owner)
        return {name: part for name, part in parts.items() if part.owner in owners}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Called by transformers with its conversions of this family. Those that stack experts which can be told apart
        are kept for layers that still have fused ones, in 16 bits."""
        stacking = [entry for entry in weight_conversions if isinstance(entry, WeightConverter)
                    and any(made_by(entry, name) for name in self.told_apart)]
        found: list[Any] = super().update_weight_conversions(
            [entry for entry in weight_conversions if entry not in stacking], model)
        for name in fused_parameters(model):
            for entry in stacking:
                if made_by(entry, name):
                    here = copy.deepcopy(entry)
                    here.scope_prefix, here.base_model_prefix = LAYER.match(name)[0], ""  # type: ignore[index]
                    found.append(here)
        return found
