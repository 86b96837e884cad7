"""quanto: the files that optimum.quanto's `QuantizedModelForCausalLM` loads."""

from __future__ import annotations

import json
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
from sinkquant.schemes import WeightFormat

MAP = "quanto_qmap.json"
REFUSAL = "one type per module, in quanto_qmap.json: load with optimum.quanto.QuantizedModelForCausalLM"
"""transformers cannot load quanto's checkpoints, and would give random weights with no more than a warning: this text,
as `weights` of the settings, makes it stop instead."""
FORMS = {"qint2": WeightFormat(2, None, storage="quanto"), "qint4": WeightFormat(4, None, storage="quanto"),
         "qint8": WeightFormat(8, -1, storage="quanto"), "qfloat8_e4m3fn": WeightFormat(8, -1, storage="quanto-float8")}


@dataclass(frozen=True)
class QuantoFiles:
    """Weights in quanto's tensors, and the map that says which module has which type."""

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """What makes plain transformers refuse the folder."""
        return {"quant_method": "quanto", "weights": REFUSAL, "activations": None,
                "modules_to_not_convert": kept_linears(model, plan)}

    def write_more(self, folder: Path, plan: Plan) -> None:
        """The map of types."""
        types = {(form.bits, form.storage): kind for kind, form in FORMS.items()}
        content = {name: {"weights": types[form.bits, form.storage], "activations": "none"}
                   for name, form in plan.formats.items()}
        (folder / MAP).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")

    def leaves(self, weight: PackedWeight | BackendWeight) -> dict[str, torch.Tensor]:
        """As quanto itself saves them."""
        assert isinstance(weight, BackendWeight)
        return weight.leaves

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """By the map of types."""
        try:
            content = json.loads((folder / MAP).read_text(encoding="utf-8"))
            types = {name: (entry["weights"], entry.get("activations", "none")) for name, entry in content.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{folder} has no readable {MAP}; get the checkpoint again.") from error
        for name, (kind, activations) in types.items():
            if kind not in FORMS or activations != "none":
                raise RequestError(f"{folder} holds {name} with the weights {kind} and the activations {activations}, "
                                   "which is not read here; load it with optimum.quanto.")
        return {name: FORMS[kind] for name, (kind, _) in types.items()}

    def reload(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Not run: at 2 and 4 bits quanto compiles an extension to load them."""
        return None
