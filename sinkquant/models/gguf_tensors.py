"""The tensors of a GGUF file that sinkquant wrote, under the names and in the order that the model has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinkquant.models.gguf import PLAIN
from sinkquant.models.gguf_index import FILE, read_index
from sinkquant.models.stored import StoredTensor
from sinkquant.schemes.gguf.layout import KINDS
from sinkquant.schemes.gguf.metadata import family_of, read_json
from sinkquant.schemes.gguf.names import Family, is_gain, model_name

DTYPES = {name: getattr(torch, kind) for name, kind in PLAIN.items()}


@dataclass(frozen=True)
class Arranged(StoredTensor):
    """A tensor whose rows come in another order than they lie in, or from whose values one is taken off."""

    order: torch.Tensor | None = None
    less_one: bool = False

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows start..stop along the first dimension."""
        if self.order is None:
            found = super().rows(start, stop)
        else:
            found = super().rows(0, self.shape[0])[self.order[start:stop]]
        return found - 1 if self.less_one else found


def gguf_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's file by the name that the model has for it; packed ones as uint8 [rows, bytes of a
    row], named by their kind ("q4_0").

    Raises:
        RequestError: the file is cut or broken.
    """
    config, path = read_json(folder / "config.json"), folder / FILE
    family = _family(config)
    found: dict[str, StoredTensor] = {}
    for name, (tensor, offset) in read_index(path).items():
        key = model_name(family, name)
        if key is None:
            continue
        dtype, shape = DTYPES.get(tensor.kind, torch.uint8), tensor.shape
        if tensor.kind not in DTYPES:
            key = f"{key.removesuffix('.weight')}.{tensor.kind.lower()}"
            shape = (shape[0], shape[1] // KINDS[tensor.kind][1] * KINDS[tensor.kind][2])
        order = row_order(config, family, name, shape[0])
        less_one = family.norms_plus_one and is_gain(name)
        if order is None and not less_one:
            found[key] = StoredTensor(path, offset, dtype, shape)
        else:
            found[key] = Arranged(path, offset, dtype, shape, None if order is None else order.argsort(), less_one)
    return found


def in_models_order(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense tensors of a folder's file -> those of the model, in their own dtype.

    Args:
        tensors: name in the file -> tensor.
    """
    config = read_json(folder / "config.json")
    family, found = _family(config), {}
    for name, tensor in tensors.items():
        key = model_name(family, name)
        if key is not None:
            order = row_order(config, family, name, tensor.shape[0])
            arranged = tensor if order is None else tensor[order.argsort()]
            found[key] = arranged - 1 if family.norms_plus_one and is_gain(name) else arranged
    return found


def row_order(config: Mapping[str, Any], family: Family, name: str, rows: int) -> torch.Tensor | None:
    """Which of the model's rows stands in each row of a tensor of the file, int64 [rows]; None for their own order.

    Args:
        config: config.json of the model.
    """
    if not (family.interleaved and (".attn_q." in name or ".attn_k." in name)):
        return None
    heads = int(config["num_attention_heads"])
    if ".attn_k." in name:
        heads = int(config.get("num_key_value_heads") or heads)
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).flatten()


def _family(config: Mapping[str, Any]) -> Family:
    return family_of(str((config.get("architectures") or [""])[0]))
