"""Gives a model a KV cache of its own: what `generate` uses when it is handed none."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.bases import Bases, needs_bases
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.prefix import Prefix, row_starts
from sinkquant.cache.prepare import prepare
from sinkquant.cache.rotary import require_rotary
from sinkquant.errors import RequestError
from sinkquant.models.blocks import kv_layers


def install(model: PreTrainedModel, plan: KVCachePlan, prefix: Prefix | None = None,
            bases: Bases | None = None, own: bool = False) -> PreTrainedModel:
    """Prepare a model, and let its `generate` start from a new SinkCache unless the caller asks for another cache, or
    for none: by `past_key_values`, `cache_implementation` or `use_cache=False`, in the call or in a generation_config
    of the caller's own. What the model's own configuration names is no such wish, and is set aside here. Where the plan
    has a `front`, generate refuses rows that do not begin with it. `prepare` has the other arguments.

    Raises:
        RequestError: the plan, the prefix or the bases are of another model, the plan needs bases and got none, or it
            drops tokens and the model has no rotary positions to move sinks by.
    """
    SinkCache(model.config, plan)
    if needs_bases(plan) and bases is None:
        raise RequestError("the KV plan rotates by matrices found on calibration text, and there are none; make the "
                           "checkpoint with sinkquant.run, or set kv_cache.rotate to 'hadamard' or 'none'.")
    if plan.evict is not None:
        require_rotary(model)
    prepare(model, prefix, bases, own)
    settings = model.generation_config
    named = settings.cache_implementation
    settings.cache_implementation, settings.use_cache = None, True
    # Partials, because they are copied with the model: a closure would go on generating from the original.
    model.generate = functools.partial(_generate, model, plan, named)
    model.generate_batch = _refuse_batching
    return model


def _generate(model: PreTrainedModel, plan: KVCachePlan, named: str | None, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = _without_default(named, args, kwargs)
    settings = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or model.generation_config
    implementation = (kwargs.get("cache_implementation") or settings.cache_implementation
                      or model.generation_config.cache_implementation)
    uses = kwargs["use_cache"] if kwargs.get("use_cache") is not None else settings.use_cache
    # Drafts by the first layers of the model itself (assistant_early_exit) take transformers' own cache.
    exits = settings.is_assistant and len(kv_layers(model.config)) != len(plan.layers)
    if kwargs.get("past_key_values") is None and not implementation and uses is not False and not exits:
        if plan.front:
            _require_front(plan.front, args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")),
                           kwargs.get("attention_mask"))
        cache = kwargs["past_key_values"] = SinkCache(model.config, plan)
        if settings.is_assistant:  # transformers asks only a cache that it makes itself
            cache.activate_past_recording()
    return type(model).generate(model, *args, **kwargs)


def _without_default(named: str | None, args: tuple[Any, ...],
                     kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call; a generation_config among them that names the same cache as the model's files do was
    read from there, and that is set aside in a copy of it."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if given is None or named is None or given.cache_implementation != named:
        return args, kwargs
    given = copy.deepcopy(given)
    given.cache_implementation = None
    if len(args) > 1:
        return (args[0], given, *args[2:]), kwargs
    return args, kwargs | {"generation_config": given}


def _refuse_batching(*_: Any, **__: Any) -> Any:
    raise RequestError("continuous batching keeps keys and values in pages of its own, 16 bits each, not in this "
                       "checkpoint's packed KV cache; call generate, or load the folder with transformers.")


def _require_front(front: list[int], ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Raises RequestError where a row does not begin with these tokens, after its padding."""
    begun = ids is not None and ids.shape[1] >= len(front)
    if ids is not None and begun:
        starts = row_starts(torch.ones_like(ids) if mask is None else mask)
        place = starts[:, None] + torch.arange(len(front), device=ids.device)
        wanted = torch.tensor(front, device=ids.device)
        begun = int(place.max()) < ids.shape[1] and bool((ids.gather(1, place) == wanted).all())
    if not begun:
        raise RequestError(f"this checkpoint's KV cache expects every row to begin with the tokens {front}; put them "
                           "there with sinkquant.cache.put_in_front(ids, mask, plan.kv_cache.front), or pass "
                           "past_key_values to use another cache.")
