"""Projections of experts, each read by itself: of a layer with many experts only a few are in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.core_model_loading import WeightRenaming, rename_source_key

from sinkquant.models.edits import Edit
from sinkquant.models.experts import ExpertLinear, by_expert
from sinkquant.models.shards import Stored, StoredTensor
from sinkquant.models.source import WeightSource, require_finite


@dataclass(frozen=True)
class StoredPart:
    """One expert's projection as it lies in a file, [rows, columns].

    Attributes:
        name: what it is called where it is refused. dtype: of the parameter that it is part of.
        edit: what is done to it whenever it is read.
    """

    name: str
    tensor: Stored
    dtype: torch.dtype
    edit: Edit | None

    def read(self) -> torch.Tensor:
        """The very values that the fused parameter would hold for it, on the CPU.

        Raises:
            RequestError: it holds NaN or Inf.
        """
        values = self.tensor[...].to(self.dtype)
        require_finite(self.name, values)
        return values if self.edit is None else self.edit(values)


def stored_parts(source: WeightSource, parts: Mapping[str, ExpertLinear]) -> dict[str, StoredPart]:
    """Name -> where it lies, for those of some projections that can be read by themselves."""
    found: dict[str, StoredPart] = {}
    keys = {parameter: _keys(source, parameter) for parameter in {part.parameter for part in parts.values()}}
    for name, part in parts.items():
        fused = source.model.get_parameter(part.parameter)
        edit = source.edits.get(part.parameter)
        if edit is not None and not edit.by_rows and part.rows != fused.shape[1]:
            continue  # its rows depend on those of another projection
        tensor = _lies_at(source, name, part, fused.shape, keys[part.parameter])
        if tensor is not None:
            found[name] = StoredPart(f"{name}.weight", tensor, fused.dtype, edit)
    return found


def in_groups(parts: Mapping[str, ExpertLinear], most: int) -> list[list[str]]:
    """The names of some projections: whole experts, one after the other, that have no more than `most` weights
    together, or one expert that has more."""
    groups: list[list[str]] = []
    together = 0
    for names in by_expert(parts).values():
        weights = sum(parts[name].weight.numel() for name in names)
        together += weights
        if groups and together <= most:
            groups[-1] += names
        else:
            groups.append(list(names))
            together = weights
    return groups


def _lies_at(source: WeightSource, name: str, part: ExpertLinear, fused: torch.Size,
             keys: Mapping[str, str]) -> Stored | None:
    """The tensor of a projection alone; None where it is something else on disk."""
    size = (part.rows, int(fused[2]))
    if part.parameter not in source.converted:  # fused on disk too: the rows of a projection follow one another
        whole = source.tensors[source.keys[part.parameter][0]]
        if not isinstance(whole, StoredTensor):
            return None
        first = (part.index * int(fused[1]) + part.start) * size[1]
        return dataclasses.replace(whole, offset=whole.offset + first * whole.dtype.itemsize, shape=size)
    tensor = source.tensors.get(keys.get(name) or keys.get(name.removeprefix(f"{source.model.base_model_prefix}."), ""))
    return tensor if tensor is not None and tuple(tensor.shape) == size else None


def _keys(source: WeightSource, parameter: str) -> dict[str, str]:
    """Name of every projection of a fused parameter -> what its tensor is called on disk."""
    renamings = [entry for entry in source.config.weight_mapping or () if isinstance(entry, WeightRenaming)]
    return {rename_source_key(key, renamings, [])[0].removesuffix(".weight"): key for key in source.keys[parameter]}
