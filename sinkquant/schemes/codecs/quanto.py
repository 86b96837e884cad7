"""quanto: affine 2 and 4 bits in groups of its own choice, symmetric int8 and float8 per row; and the files that
optimum.quanto's `QuantizedModelForCausalLM` loads."""

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
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.codec import Leaves, LibraryCodec
from sinkquant.schemes.codecs.files import LibraryFiles, kept_linears
from sinkquant.schemes.quanto import BACKEND, FLOAT8, INTEGERS, Quanto

MAP = "quanto_qmap.json"
REFUSAL = "one type per module, in quanto_qmap.json: load with optimum.quanto.QuantizedModelForCausalLM"
"""transformers cannot load quanto's checkpoints, and would give random weights with no more than a warning: this text,
as `weights` of the settings, makes it stop instead."""
FORMS = {"qint2": WeightFormat(2, None, storage=INTEGERS.storage),
         "qint4": WeightFormat(4, None, storage=INTEGERS.storage),
         "qint8": WeightFormat(8, -1, storage=INTEGERS.storage),
         "qfloat8_e4m3fn": WeightFormat(8, -1, storage=FLOAT8.storage)}


@dataclass(frozen=True)
class QuantoCodec(LibraryCodec):
    """Round to nearest with quanto's own optimizers: the range of a group at 2 and 4 bits, the largest weight of a row
    at 8."""

    scheme: Quanto

    def encode(self, weight: torch.Tensor, form: WeightFormat) -> Leaves:
        """weight: float [rows, columns]."""
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer
        from optimum.quanto.tensor import qfloat8, qint2, qint4, qint8, quantize_weight

        kind = qfloat8 if self.scheme.floating else {2: qint2, 4: qint4, 8: qint8}[form.bits]
        group = None if form.group_size in (None, -1) else form.group_size
        if form.bits == 8:
            scale, shift = AbsmaxOptimizer()(weight, qtype=kind, axis=0), None
            if self.scheme.floating:  # integers of a row of zeros are zeros, floats would be 0 / 0
                scale = scale.masked_fill(scale == 0, 1.0)
        else:
            scale, shift = MaxOptimizer()(weight, qtype=kind, axis=0, group_size=group)
        made = quantize_weight(weight, kind, 0, scale, shift, group, optimized=False)
        leaves: Leaves = {}
        made.save_to_state_dict(leaves, "weight.", False)
        one = torch.ones((), dtype=weight.dtype)
        return {name: leaf.contiguous() for name, leaf in leaves.items()} | {
            "input_scale": one, "output_scale": one.clone()}

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, [rows, columns] in `dtype`: scale * code - shift."""
        scale = leaves["weight._scale"].to(dtype)
        if form.bits == 8:
            return (scale * leaves["weight._data"].to(dtype)).reshape(shape)
        # quanto unpacks with an extension that it compiles on first use: a minute, and a compiler, for two shifts.
        packed = leaves["weight._data._data"]
        codes = torch.cat([packed >> used & 2 ** form.bits - 1 for used in range(0, 8, form.bits)])[:len(scale)]
        return (scale * codes - leaves["weight._shift"].to(dtype)).reshape(shape)


class QuantoFiles(LibraryFiles):
    """Weights in quanto's tensors, and the map that says which module has which type."""

    backend = BACKEND

    def recognizes(self, folder: Path, settings: dict[str, Any]) -> bool:
        """By the map of types, with or without a word in config.json."""
        return (folder / MAP).is_file() or super().recognizes(folder, settings)

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
