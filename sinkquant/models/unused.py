"""Tensors of a model's folder that transformers does not compute with: multi-token prediction, mostly.

A checkpoint takes them along as they are, since other engines compute with them and config.json announces them. Only
buffers of older versions that transformers computes anew are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models.experts import LoadedNames
from sinkquant.models.folder import read_settings
from sinkquant.models.gguf_index import is_gguf_checkpoint
from sinkquant.models.shards import StoredTensor, stored_tensors
from sinkquant.models.source import folder_of, source_of
from sinkquant.models.stored import runs_of_rows

COMPUTED = ("inv_freq", "masked_bias")
"""Leaves that hold no weights."""


@dataclass(frozen=True)
class Unused:
    """`carried`: name on disk -> tensor that a checkpoint takes along. `left`: names of those that it does not."""

    carried: dict[str, StoredTensor] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """One of those that are carried, as (first row, rows)."""
        tensor = self.carried[name]
        if not tensor.shape:
            yield 0, tensor[...]
            return
        for start, stop in runs_of_rows(tensor.shape):
            yield start, tensor.rows(start, stop)

    @property
    def modules(self) -> list[str]:
        """Names of the linears among those that are carried: an engine must not look for codes there."""
        return [name.removesuffix(".weight") for name, tensor in self.carried.items()
                if name.endswith(".weight") and len(tensor.shape) == 2]

    def notes(self) -> list[str]:
        """What is to be said of them."""
        said = []
        if self.carried:
            said.append(f"{_listed(self.carried)} are taken along as they are: transformers does not compute with "
                        "them, other engines may")
        if self.left:
            said.append(f"{_listed(self.left)} are left out: transformers does not read them")
        return said


def unused_of(model: PreTrainedModel) -> Unused:
    """What the folder of an unquantized model holds beside its parameters and buffers; only headers are read."""
    folder = folder_of(model)
    if folder is None or read_settings(folder).get("quantization_config") is not None:
        return Unused()
    source = source_of(model)
    if source is None and not (is_gguf_checkpoint(folder) or any(folder.glob("*.safetensors"))):
        return Unused()  # a model in memory, from a folder of pickled weights
    stored, loaded = stored_tensors(folder), LoadedNames(model)
    names = [name for name in stored if loaded.becomes(name) not in loaded.state
             and (source is None or name in source.tensors)]
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    left = [name for name in names if name.rpartition(".")[2] in COMPUTED
            or not modules.isdisjoint({name.rpartition(".")[0], prefix + name.rpartition(".")[0]})]
    return Unused({name: stored[name] for name in names if name not in left}, tuple(left))


def require_nothing_carried(model: PreTrainedModel, less: str) -> None:
    """Refuse a model that comes with tensors which would not fit what is left of it. less: what that is, for the
    error."""
    carried = unused_of(model).carried
    if carried:
        raise RequestError(f"this model comes with {next(iter(carried))}, which transformers does not compute with: it "
                           f"would not fit the {less}.")


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f"the tensors {', '.join(shown[:2])}{more}"
