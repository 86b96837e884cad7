"""Checkpoints of other libraries' files, read as dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import open_model
from sinkquant.models.folder import read_settings
from sinkquant.models.shards import Stored, StoredTensor, stored_tensors
from sinkquant.models.source import ATTRIBUTE, source_of
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs.files import LibraryFiles
from sinkquant.schemes.codecs.registry import codec_of, library_files
from sinkquant.schemes.packages import require_packages


def files_in(folder: Path) -> LibraryFiles | None:
    """The library whose checkpoint a folder is, or None for compressed-tensors, an unquantized model, or another."""
    settings = _settings(folder)
    return next((files for files in library_files() if files.recognizes(folder, settings)), None)


def forms_in(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, WeightFormat]:
    """Module name -> format of every linear that a library's folder packs.

    Raises:
        RequestError: it is packed in a way that is not read here, or its library is not installed.
    """
    files = files_in(folder)
    if files is None:
        return {}
    require_packages(files.backend)
    return files.forms(folder, _settings(folder), stored)


def is_library(folder: Path) -> bool:
    """Whether a folder is a checkpoint of one of these libraries."""
    return files_in(folder) is not None


def rounds_inputs(folder: Path) -> bool:
    """Whether the inputs of its linears are rounded too, which dense weights cannot show: LLM.int8()."""
    return is_library(folder) and any(scheme_of(form).own_module for form in forms_in(
        folder, stored_tensors(folder)).values())


def open_checkpoint(folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`open_model` of any checkpoint that sinkquant writes: its weights are read, dense, when they are needed.

    Raises:
        RequestError: it is quantized in a way that is not read here.
    """
    if files_in(folder) is None:
        return open_model(folder, trust_remote_code)
    forms = forms_in(folder, stored_tensors(folder))

    def unpack(stored: Mapping[str, StoredTensor], model: PreTrainedModel, kind: torch.dtype) -> dict[str, Stored]:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        unknown = sorted(name for name in forms if f"{name}.weight" not in shapes)
        if unknown:
            raise RequestError(f"{folder} packs {unknown[0]}, which the model of its config.json does not have.")
        return dense_view(stored, forms, shapes, kind)

    return open_model(folder, trust_remote_code, dtype, unpack)


def dense_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model from `open_checkpoint` with all its weights in memory for good."""
    source = source_of(model)
    assert source is not None
    with source.present([model]):
        held = [(module, dict(module._parameters)) for module in model.modules()]
    for module, parameters in held:
        module._parameters.update(parameters)
    delattr(model, ATTRIBUTE)
    return model


@dataclass(frozen=True)
class DecodedTensor:
    """The dense weight that the tensors of a linear stand for, [rows, columns] in `dtype`."""

    leaves: dict[str, StoredTensor]
    form: WeightFormat
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        read = {name: leaf[...] for name, leaf in self.leaves.items()}
        return codec_of(self.form).decode(read, self.form, self.shape, self.dtype)


def dense_view(stored: Mapping[str, StoredTensor], forms: Mapping[str, WeightFormat], shapes: Mapping[
        str, torch.Size], dtype: torch.dtype) -> dict[str, Stored]:
    """Replace the tensors of every packed linear by the dense weight that they stand for.

    Args:
        shapes: parameter name -> its shape in the dense model.
    """
    leaves: dict[str, dict[str, StoredTensor]] = {name: {} for name in forms}
    dense: dict[str, Stored] = {}
    for key, tensor in stored.items():
        owner = next((key[:end] for end, letter in enumerate(key) if letter == "." and key[:end] in forms), None)
        if owner is None or key == f"{owner}.bias":
            dense[key] = tensor
        else:
            leaves[owner][key[len(owner) + 1:]] = tensor
    for name, form in forms.items():
        dense[f"{name}.weight"] = DecodedTensor(leaves[name], form, tuple(shapes[f"{name}.weight"]), dtype)
    return dense


def _settings(folder: Path) -> dict[str, Any]:
    found = read_settings(folder).get("quantization_config")
    return found if isinstance(found, dict) else {}
