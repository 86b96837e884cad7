"""sinkquant's own checkpoint format, registered with transformers: compressed-tensors' `pack-quantized` tensors with
columns and single weights beside the codes, and `Conv1D`. `import sinkquant` is what makes `from_pretrained` know it:
this module is imported while transformers still is, so that it imports little itself.

Used only where a plan needs it; everything else stays plain compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sinkquant.artifacts import Plan
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.scheme import OWN
from sinkquant.schemes.tensors import scale_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = OWN


def own_config(settings: dict[str, Any], plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of config.json: that of compressed-tensors, with how much stands beside the codes of
    every module that has anything there, [columns, single weights], and the dtype of scales and side tensors.

    Args:
        settings: what `quantization_config` gives. dtype: of the model.
    """
    side = {name: [form.columns, form.scalars] for name, form in plan.formats.items() if form.split}
    return settings | {"quant_method": METHOD, "scale_dtype": scale_dtype(str(dtype).removeprefix("torch.")),
                       "side": side}


@register_quantization_config(METHOD)
class SinkquantConfig(QuantizationConfigMixin):
    """What config.json says, as `own_config` writes it."""

    def __init__(self, config_groups: dict[str, Any], side: dict[str, list[int]], scale_dtype: str,
                 **others: Any) -> None:
        self.quant_method = METHOD
        self.config_groups, self.side, self.scale_dtype = config_groups, side, scale_dtype
        self.__dict__.update(others | {"quant_method": METHOD})

    def formats(self, names: Iterable[str]) -> dict[str, WeightFormat]:
        """Module name -> how its weight is stored, for those that are packed."""
        found = {}
        for group in self.config_groups.values():
            exact = set(group["targets"])
            weights = group["weights"]
            for name in names:
                if name in exact or f"re:^{re.escape(name)}$" in exact:
                    columns, scalars = self.side.get(name, (0, 0))
                    found[name] = WeightFormat(weights["num_bits"], weights["group_size"] or -1, columns=columns,
                                               scalars=scalars)
        return found


@register_quantizer(METHOD)
class SinkquantQuantizer(HfQuantizer):
    """Puts a `PackedLinear` where a weight is packed, before transformers loads the tensors into it."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        from sinkquant.models import weight_matrix
        from sinkquant.schemes.codecs.packed_linear import PackedLinear

        settings, dtype = self.quantization_config, model.dtype
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        formats = settings.formats(linears)
        for name, form in formats.items():
            transposed, (rows, columns) = isinstance(linears[name], Conv1D), weight_matrix(linears[name]).shape
            packed = PackedLinear(rows, columns, form, settings.scale_dtype, dtype, linears[name].bias is not None,
                                  transposed, device="meta")
            model.set_submodule(name, packed)
        # The file's guard, which keeps others from loading it, is no weight.
        guards = [f"^{re.escape(name)}\\.weight$" for name in formats]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the packed tensors as they are, and the guard."""
        from sinkquant.schemes.codecs.packed_linear import PackedLinear

        state = model.state_dict()
        first = next(name for name, module in model.named_modules() if isinstance(module, PackedLinear))
        return state | {f"{first}.weight": torch.empty(0, dtype=torch.int8)}, {}

    def is_serializable(self) -> bool:
        """Packed weights are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def made_dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Put dense linears in place of the packed ones, in place. Returns the model."""
    from sinkquant.schemes.codecs.packed_linear import PackedLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.dense(dtype))
    return model
