"""The same architecture with fewer heads: whether transformers can build it, and which values every tensor keeps.

Plain transformers reads one number of heads for all layers: its per-layer configurations, tried with version 5.23 on
every family that is tested here, end in an error where the number of heads is among what differs. So whole key-value
heads go, with the queries that read them, as many in every layer, and the width of a head stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models.blocks import layer_config
from sinkquant.models.decoder import Decoder, weight_matrix
from sinkquant.models.head import keep_head
from sinkquant.models.loading import auto_class
from sinkquant.models.tensors import pieces

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
PER_HEAD = ("sinks",)
"""Parameters outside linears that hold one number for every query head."""


@dataclass(frozen=True)
class HeadCounts:
    """Query heads, key-value heads and the width of a head, the same in every layer."""

    heads: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadCounts:
        """As the configuration says them."""
        config = layer_config(model.config.get_text_config(decoder=True), 0)
        heads = int(config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, int(getattr(config, "num_key_value_heads", None) or heads), int(width))

    @property
    def shared(self) -> int:
        """Query heads that read one key-value head."""
        return self.heads // self.kv_heads

    def kept(self, size: int, kv_heads: list[int], per_head: bool) -> torch.Tensor | None:
        """The places that are left of a dimension of `size`, int64 ascending; None where it does not lie head by head.

        Args:
            kv_heads: the key-value heads that stay, ascending. per_head: one place for every query head.
        """
        queries = [kv * self.shared + query for kv in kv_heads for query in range(self.shared)]
        if per_head:
            return torch.tensor(queries) if size == self.heads else None
        parts = {self.heads: [queries], self.kv_heads: [kv_heads],
                 self.heads + 2 * self.kv_heads: [queries, [self.heads + kv for kv in kv_heads],
                                                  [self.heads + self.kv_heads + kv for kv in kv_heads]]}
        if size % self.width or size // self.width not in parts:
            return None
        heads = torch.tensor([head for part in parts[size // self.width] for head in part])
        return (heads[:, None] * self.width + torch.arange(self.width)).flatten()


def smaller_model(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel | None:
    """The model on the meta device with so many key-value heads in every layer, or None where transformers cannot build
    it, or where something else than the heads' own rows and columns would change its shape."""
    counts = HeadCounts.of(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    try:
        text.head_dim = counts.width
        text.num_attention_heads = kv_heads * counts.shared
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = kv_heads
        config = type(config).from_dict(config.to_dict())
        keep_head(model, config)
        with init_empty_weights(include_buffers=False):
            smaller = auto_class(config).from_config(config, dtype=model.dtype)
    except Exception:  # every architecture has its own way to say that its width is not divided by the heads
        return None
    smaller.tie_weights()
    before, after = model.state_dict(), smaller.state_dict()
    changed = [name for name in before if name in after and before[name].shape != after[name].shape]
    if before.keys() != after.keys() or not changed:
        return None
    decoder, stay = Decoder.of(model), list(range(kv_heads))
    fits = all(_fits(_parts(decoder, name, counts, stay, tuple(after[name].shape)), tuple(after[name].shape))
               for name in changed)
    return smaller.eval() if fits else None


def smaller_tensor(decoder: Decoder, name: str, kv_heads: list[list[int]], shape: list[int]) -> torch.Tensor:
    """What is left of a tensor, in its own dtype.

    Args:
        decoder: the model as it was. kv_heads: the key-value heads that stay, for every layer, ascending.
        shape: of the tensor in the model from `smaller_model`.
    """
    tensor = torch.cat([rows for _, rows in pieces(decoder, name)])
    parts = _parts(decoder, name, HeadCounts.of(decoder.model), kv_heads[decoder.block_of(name)], tuple(shape))
    assert parts is not None
    for dimension, part in enumerate(parts):
        if part is not None:
            tensor = tensor.index_select(dimension, part)
    return tensor


def _parts(decoder: Decoder, name: str, counts: HeadCounts, stay: list[int],
           shape: tuple[int, ...]) -> list[torch.Tensor | None] | None:
    """What stays of every dimension of a tensor, None for all of it; None where the tensor cannot be cut."""
    owner = decoder.model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    before = tuple(decoder.model.state_dict()[name].shape)
    inside = any(name.startswith(f"{block}.") for block in decoder.block_names)
    if not inside or not (isinstance(owner, nn.Linear) or leaf in PER_HEAD):
        return None
    parts: list[torch.Tensor | None] = []
    for old, new in zip(before, shape, strict=True):
        part = None if old == new else counts.kept(old, stay, leaf in PER_HEAD)
        if old != new and part is None:
            return None
        parts.append(part)
    return parts


def _fits(parts: list[torch.Tensor | None] | None, shape: tuple[int, ...]) -> bool:
    return parts is not None and all(
        part is None or len(part) == size for part, size in zip(parts, shape, strict=True))


def head_columns(decoder: Decoder, layer: int) -> tuple[str, list[slice]]:
    """The output projection of a layer's attention, and the input columns that every query head fills.

    Raises:
        RequestError: the attention has no single linear after it that every head fills an equal part of.
    """
    found = [name for name in decoder.linears if decoder.block_of(name) == layer and _in_attention(decoder, name)
             and name.rpartition(".")[2] in OUTPUT_PROJECTIONS]
    heads = int(layer_config(decoder.model.config.get_text_config(decoder=True), layer).num_attention_heads)
    columns = weight_matrix(decoder.linears[found[0]]).shape[1] if len(found) == 1 else 1
    if len(found) != 1 or columns % heads:
        raise RequestError(f"{type(decoder.model).__name__} has no output projection that reads its heads side by "
                           "side, so none of them can be taken out; leave prune.heads out.")
    width = columns // heads
    return found[0], [slice(head * width, (head + 1) * width) for head in range(heads)]


def _in_attention(decoder: Decoder, name: str) -> bool:
    parent = decoder.model.get_submodule(name.rpartition(".")[0])
    return "attention" in type(parent).__name__.lower()
