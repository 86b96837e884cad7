"""Keys and values of the first tokens of every row, computed once by the unquantized model (IntactKV 2403.01241,
PrefixQuant 2410.05265): what a quantized model gets wrong about its sinks never enters the cache.

The prefix is part of a row, not put in front of it: where a row begins with these tokens, theirs are replaced on their
way into the cache. Masks, positions and padding stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkquant.cache.ordered import load_ordered, save_ordered
from sinkquant.errors import RequestError
from sinkquant.models import AttentionRecord, Walk, vocabulary_of
from sinkquant.models.blocks import kv_layers, layer_config
from sinkquant.models.hooks import evaluating

SCHEMA = "sinkquant/kvprefix@1"
SMALLEST = 2.0 ** -14
"""Of float16's normal numbers: below it numbers of bfloat16 change when a model is loaded in float16."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Attributes:
        ids: the tokens, in order, from the first of a row on.
        keys, values: layer -> [kv_heads, tokens, head_dim] in the dtype of the model that made them.
        model: fingerprint of that model; see `fingerprint`.
    """

    ids: tuple[int, ...]
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    model: str


def make_prefix(model: PreTrainedModel, ids: list[int]) -> Prefix:
    """Run the unquantized model over the tokens of a prefix and keep every layer's keys and values.

    Raises:
        RequestError: there are no tokens, or some that the model does not know.
    """
    vocabulary = vocabulary_of(model)
    if not ids or not all(0 <= token < vocabulary for token in ids):
        raise RequestError(f"a prefix needs token ids from 0 to {vocabulary - 1}, and at least one of them.")
    cache = DynamicCache()  # without a configuration it keeps all of it, of sliding layers too
    with evaluating(model), torch.no_grad():
        model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    layers = {index: layer for index, layer in enumerate(cache.layers) if layer.is_initialized}
    return Prefix(tuple(ids), {index: layer.keys[0].clone() for index, layer in layers.items()},
                  {index: layer.values[0].clone() for index, layer in layers.items()}, fingerprint(model, ids))


def find_prefix(walk: Walk) -> Prefix:
    """The same of a model whose blocks may lie on disk.

    Args:
        walk: over one row, the tokens of the prefix; not begun, without observers.
    """
    model = walk.decoder.model
    seen = _States([layer.heads for layer in kv_layers(model.config)])
    walk.observers.append(seen)
    for step in walk.steps():
        step.run()
    ids = walk.rows[0].tolist()
    with walk.decoder.present([model.get_input_embeddings()]):
        return Prefix(tuple(ids), seen.keys, seen.values, fingerprint(model, ids))


class _States:
    """Keeps the keys and values of a single row.

    Args:
        heads: of every layer, those that a cache holds, of which JetMoE attends to copies, one after the other; 0: all.
    """

    def __init__(self, heads: list[int]) -> None:
        self.heads = heads
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def attention(self, record: AttentionRecord) -> None:
        """Keep those of one layer."""
        heads = self.heads[record.layer] or record.key.shape[1]
        self.keys[record.layer] = record.key[0, :heads].cpu().clone()
        self.values[record.layer] = record.value[0, :heads].cpu().clone()


def fingerprint(model: PreTrainedModel, ids: list[int]) -> str:
    """A hash of the architecture and of the embeddings of these tokens, which quantization leaves alone."""
    config = model.config.get_text_config(decoder=True)
    facts = [type(model).__name__, config.num_hidden_layers, config.hidden_size,
             layer_config(config, 0).num_attention_heads, getattr(config, "rope_parameters", None)]
    rows = model.get_input_embeddings().weight[torch.tensor(ids)].detach().to("cpu", torch.bfloat16)
    rows[rows.abs() < SMALLEST] = 0
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())  # config.json is written sorted
    digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_embedding(model: PreTrainedModel) -> None:
    """Raises RequestError where nothing of the token embedding is in memory, by which a model is known."""
    if model.get_input_embeddings().weight.is_meta:
        raise RequestError("the token embedding is offloaded, by which the model of a KV cache is known; keep it in "
                           "memory (device_map), or load the model without the cache by transformers.")


def save_prefix(prefix: Prefix, path: str | os.PathLike[str]) -> None:
    """Write a prefix as one safetensors file."""
    tensors = {f"{index}.{name}": tensor.contiguous() for name, states in (("keys", prefix.keys),
               ("values", prefix.values)) for index, tensor in states.items()}
    save_ordered(tensors, path, {"schema": SCHEMA, "ids": json.dumps(prefix.ids), "model": prefix.model})


def load_prefix(path: str | os.PathLike[str]) -> Prefix:
    """Read a prefix back.

    Raises:
        RequestError: there is no such file, or it holds no prefix.
    """
    facts, tensors = load_ordered(path, SCHEMA, "KV prefix", "make the checkpoint again")
    states: dict[str, dict[int, torch.Tensor]] = {"keys": {}, "values": {}}
    for name, tensor in tensors.items():
        index, _, kind = name.partition(".")
        states[kind][int(index)] = tensor
    return Prefix(tuple(json.loads(facts["ids"])), states["keys"], states["values"], facts["model"])


def require_same_model(prefix: Prefix, model: PreTrainedModel) -> None:
    """Raises RequestError where the prefix was made by another model, or its embedding is offloaded."""
    require_embedding(model)
    vocabulary = vocabulary_of(model)
    if max(prefix.ids) >= vocabulary or fingerprint(model, list(prefix.ids)) != prefix.model:
        raise RequestError("the KV prefix was made by another model; make it again with make_prefix.")


def put_in_front(ids: torch.Tensor, mask: torch.Tensor | None, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with `tokens` between their padding on the left and their own first token, and the mask that they have then.

    Args:
        ids: int64 [rows, length].
        mask: [rows, length], zero on padding; None where there is none.
        tokens: a plan's `front`, say.

    Returns:
        int64 [rows, length + tokens], twice.
    """
    mask = torch.ones_like(ids) if mask is None else mask.long()
    if not tokens:
        return ids, mask
    starts = row_starts(mask)
    column = torch.arange(ids.shape[1] + len(tokens), device=ids.device)[None] - starts[:, None]
    before, inside = column < 0, (column >= 0) & (column < len(tokens))
    place = starts[:, None] + torch.where(before, column, (column - len(tokens)).clamp(min=0))
    place = place.clamp(max=ids.shape[1] - 1)
    front = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
    return (torch.where(inside, front[column.clamp(0, len(tokens) - 1)], ids.gather(1, place)),
            torch.where(inside, 1, mask.gather(1, place)))


def row_starts(mask: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: columns of padding before every row. mask: [rows, length], zero on padding."""
    return (mask.long().cumsum(1) == 0).sum(1)


class PrefixMatch:
    """Which new columns continue the prefix in their row, and the states that belong there.

    Args:
        matched: int64 [batch], how many tokens of the prefix every row has matched before.
        ids, positions: int64 [batch, new]; see `sinkquant.cache.exact.NewTokens`.
    """

    def __init__(self, prefix: Prefix, matched: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.prefix = prefix
        wanted = torch.tensor(prefix.ids, device=ids.device)
        inside = (positions >= 0) & (positions < len(wanted))
        same = inside & (ids == wanted[positions.clamp(0, len(wanted) - 1)])
        # Padding before a row does not break the run; the first token that differs does.
        unbroken = (same | (positions < 0)).long().cumprod(1).bool()
        begun_right = torch.where(positions >= 0, positions, len(wanted)).amin(1) == matched
        self.flags = same & unbroken & begun_right[:, None]
        self.matched = matched + self.flags.sum(1)
        self.row, self.column = torch.nonzero(self.flags, as_tuple=True)
        self.place = positions[self.row, self.column]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [batch, kv_heads, new, head_dim] with those of the prefix in their place."""
        if not len(self.row) or layer not in self.prefix.keys:
            return keys, values
        both = []
        # Of a model on several devices, a layer is not always where the token ids are.
        row, column, place = (one.to(keys.device) for one in (self.row, self.column, self.place))
        for states, exact in ((keys, self.prefix.keys[layer]), (values, self.prefix.values[layer])):
            replaced = states.clone()
            replaced[row, :, column] = exact.to(states)[:, place].transpose(0, 1)
            both.append(replaced)
        return both[0], both[1]
