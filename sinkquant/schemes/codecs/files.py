"""The contract of what a checkpoint holds beside the tensors of its linears: how one library writes and reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sinkquant.artifacts import Plan
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat


class Files(ABC):
    """The files of one library's checkpoints.

    Attributes:
        backend: its name in a recipe, and the `quant_method` of config.json.
    """

    backend: ClassVar[str]

    @abstractmethod
    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def write_more(self, folder: Path, plan: Plan) -> None:  # noqa: B027
        """Files that the library wants beside config.json and the weights: none."""

    def finish(self, folder: Path, plan: Plan, architecture: str, written: Callable[[], None]) -> None:
        """Make of a folder that is all written what the library reads, where that is no safetensors file.

        Args:
            architecture: transformers' class of the model.
            written: called once nothing can fail for want of room, and before the safetensors files change.
        """
        written()


class LibraryFiles(Files):
    """Files that are read here too, since compressed-tensors does not."""

    def recognizes(self, folder: Path, settings: dict[str, Any]) -> bool:
        """Whether a folder with that `quantization_config` is one of its checkpoints."""
        return settings.get("quant_method") == self.backend

    @abstractmethod
    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """Module name -> format of every packed linear of a folder.

        Raises:
            RequestError: it is packed in a way that is not read here.
        """

    def reload(self, kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """Every dense parameter as the library itself loads it into that class, or None where it cannot be run here."""
        return None


def kept_linears(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Names of the linears that a plan leaves alone, the output head among them."""
    packed = plan.formats
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name not in packed]
