"""A cache on disk: one safetensors file, packed as it is held, so that reading it back changes no bit."""

from __future__ import annotations

import json
import os

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.ordered import load_ordered, save_ordered
from sinkquant.errors import RequestError
from sinkquant.models.blocks import kv_layers

SCHEMA = "sinkquant/kvcache@1"
ROWS = "row_starts", "matched"
"""What a cache knows of its rows."""


def save_cache(cache: SinkCache, path: str | os.PathLike[str]) -> None:
    """Write a cache with its plan.

    Raises:
        RequestError: a layer keeps something else than keys and values (a linear-attention state).
    """
    tensors: dict[str, torch.Tensor] = {}
    lengths: dict[str, list[int]] = {}
    dropped: dict[str, int] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DummyLayer):  # reads what an earlier layer holds
            continue
        if isinstance(layer, SinkLayer):
            held = layer.tensors()
            lengths[str(index)], dropped[str(index)] = layer.lengths, layer.dropped
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
            lengths[str(index)] = [layer.get_seq_length()]
        else:
            raise RequestError(f"layer {index} keeps a {type(layer).__name__}, which is not saved; only keys and "
                               "values are.")
        tensors |= {f"{index}.{name}": tensor.contiguous().clone() for name, tensor in held.items()}
    for name in ROWS:
        if getattr(cache, name) is not None:
            tensors[name] = getattr(cache, name).clone()
    save_ordered(tensors, path, {"schema": SCHEMA, "plan": cache.plan.model_dump_json(), "lengths": json.dumps(lengths),
                                 "dropped": json.dumps(dropped)})


def load_cache(config: PreTrainedConfig, path: str | os.PathLike[str], device: str = "cpu",
               plan: KVCachePlan | None = None) -> SinkCache:
    """Read a cache back, for the model with this configuration.

    Args:
        plan: what the cache must have been packed by; None for any.

    Raises:
        RequestError: there is no such file, it holds no cache, or the cache of another model or plan.
    """
    facts, tensors = load_ordered(path, SCHEMA, "KV cache", "save the cache again", device=device)
    held_by = KVCachePlan.model_validate_json(facts["plan"])
    if plan is not None and held_by != plan:
        raise RequestError(f"{path} holds a KV cache of another plan; fill a new one, or load the checkpoint that it "
                           "was made with.")
    cache = SinkCache(config, held_by)
    for index, (layer, real) in enumerate(zip(held_by.layers, kv_layers(config), strict=True)):
        if layer.packed and (len(layer.key_bits), layer.key_dim, layer.value_dim) != (
                real.heads, real.key_dim, real.value_dim):
            raise RequestError(f"{path} holds the KV cache of another model: layer {index} has {len(layer.key_bits)} "
                               f"KV heads of {layer.key_dim} channels in it, and this model {real.heads} KV heads of "
                               f"{real.key_dim}; fill a new one.")
    for name in ROWS:
        setattr(cache, name, tensors.pop(name, None))
    dropped = json.loads(facts["dropped"])
    for index, lengths in json.loads(facts["lengths"]).items():
        held = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{index}.")}
        layer = cache.layers[int(index)]
        if held and isinstance(layer, SinkLayer):
            layer.restore(held, lengths, dropped[index])
        elif held:
            layer.lazy_initialization(held["keys"], held["values"])
            layer.keys, layer.values = held["keys"], held["values"]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = lengths[0]
    return cache
