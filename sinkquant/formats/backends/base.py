"""What every backend does for a checkpoint, and reading a folder of any of them as dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sinkquant.artifacts import Plan
from sinkquant.models.shards import Stored, StoredTensor
from sinkquant.quantize import BackendWeight, PackedWeight, codec
from sinkquant.schemes import WeightFormat


class Backend(Protocol):
    """The files of one library's checkpoints."""

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def write_more(self, folder: Path, plan: Plan) -> None:
        """Files that the library wants beside config.json and the weights."""

    def leaves(self, weight: PackedWeight | BackendWeight) -> dict[str, torch.Tensor]:
        """The tensors that a linear becomes, by the names that follow the module's."""

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """Module name -> format of every packed linear of a folder.

        Raises:
            RequestError: it is packed in a way that is not read here.
        """

    def reload(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Every dense parameter as the library itself loads it, or None where it cannot be run here."""


@dataclass(frozen=True)
class BackendTensor:
    """The dense weight that a backend's tensors stand for, [rows, columns] in `dtype`."""

    leaves: dict[str, StoredTensor]
    form: WeightFormat
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        read = {name: leaf[...] for name, leaf in self.leaves.items()}
        return codec(self.form).decode(read, self.shape, self.dtype)


def dense_view(stored: Mapping[str, StoredTensor], forms: Mapping[str, WeightFormat], shapes: Mapping[
        str, torch.Size], dtype: torch.dtype) -> dict[str, Stored]:
    """Replace the tensors of every packed linear by the dense weight that they stand for.

    Args:
        shapes: parameter name -> its shape in the dense model.
    """
    leaves: dict[str, dict[str, StoredTensor]] = {name: {} for name in forms}
    dense: dict[str, Stored] = {}
    for key, tensor in stored.items():
        owner = next((key[:end] for end in _dots(key) if key[:end] in forms), None)
        if owner is None or key == f"{owner}.bias":
            dense[key] = tensor
        else:
            leaves[owner][key[len(owner) + 1:]] = tensor
    for name, form in forms.items():
        dense[f"{name}.weight"] = BackendTensor(leaves[name], form, tuple(shapes[f"{name}.weight"]), dtype)
    return dense


def kept_linears(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Names of the linears that a plan leaves alone, the output head among them."""
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name not in plan.formats]


def _dots(key: str) -> list[int]:
    return [place for place, character in enumerate(key) if character == "."]
