"""Checkpoints in the formats of other libraries: one short file per backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.formats.backends.base import Backend, dense_view
from sinkquant.formats.backends.bitsandbytes import BitsAndBytes
from sinkquant.formats.backends.gptq import GPTQFiles
from sinkquant.formats.backends.quanto import MAP, QuantoFiles
from sinkquant.models import open_model
from sinkquant.models.shards import Stored, StoredTensor, stored_tensors
from sinkquant.quantize import require_packages
from sinkquant.schemes import WeightFormat

__all__ = ["BACKENDS", "Backend", "backend_in", "dense_of", "forms_in", "is_backend", "open_checkpoint",
           "rounds_inputs"]

BACKENDS: dict[str, Backend] = {"bitsandbytes": BitsAndBytes(), "quanto": QuantoFiles(), "gptq": GPTQFiles()}
"""By the `quant_method` of config.json, which is the recipe's `backend` too."""


def backend_in(folder: Path) -> Backend | None:
    """The backend whose checkpoint a folder is, or None for compressed-tensors, an unquantized model, or another."""
    return BACKENDS.get("quanto" if (folder / MAP).is_file() else str(_settings(folder).get("quant_method")))


def forms_in(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, WeightFormat]:
    """Module name -> format of every linear that a backend's folder packs.

    Raises:
        RequestError: it is packed in a way that is not read here, or its library is not installed.
    """
    backend = backend_in(folder)
    if backend is None:
        return {}
    require_packages(next(name for name, one in BACKENDS.items() if one is backend))
    return backend.forms(folder, _settings(folder), stored)


def is_backend(folder: Path) -> bool:
    """Whether a folder is a checkpoint of one of these backends."""
    return backend_in(folder) is not None


def rounds_inputs(folder: Path) -> bool:
    """Whether the inputs of its linears are rounded too, which dense weights cannot show: LLM.int8()."""
    return is_backend(folder) and any(form.storage == "llm.int8" for form in forms_in(
        folder, stored_tensors(folder)).values())


def open_checkpoint(folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`open_model` of any checkpoint that sinkquant writes: its weights are read, dense, when they are needed.

    Raises:
        RequestError: it is quantized in a way that is not read here.
    """
    if backend_in(folder) is None:
        return open_model(folder, trust_remote_code)
    forms = forms_in(folder, stored_tensors(folder))

    def unpack(stored: Mapping[str, StoredTensor], model: PreTrainedModel, kind: torch.dtype) -> dict[str, Stored]:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        foreign = sorted(name for name in forms if f"{name}.weight" not in shapes)
        if foreign:
            raise RequestError(f"{folder} packs {foreign[0]}, which the model of its config.json does not have.")
        return dense_view(stored, forms, shapes, kind)

    return open_model(folder, trust_remote_code, dtype, unpack)


def dense_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model from `open_checkpoint` with all its weights in memory for good."""
    from sinkquant.models.source import ATTRIBUTE, source_of

    source = source_of(model)
    assert source is not None
    with source.present([model]):
        held = [(module, dict(module._parameters)) for module in model.modules()]
    for module, parameters in held:
        module._parameters.update(parameters)
    delattr(model, ATTRIBUTE)
    return model


def _settings(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{folder / 'config.json'} cannot be read ({error}); get the checkpoint again.") from error
    found = content.get("quantization_config") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}
