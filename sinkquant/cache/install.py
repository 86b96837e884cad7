"""Gives a model a KV cache of its own: what `generate` uses when it is handed none."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.prefix import Prefix, row_starts
from sinkquant.cache.prepare import prepare
from sinkquant.errors import RequestError


def install(model: PreTrainedModel, plan: KVCachePlan, prefix: Prefix | None = None) -> PreTrainedModel:
    """Prepare a model, and let its `generate` start from a new SinkCache where the call names no cache of its own
    (`past_key_values`, `cache_implementation`, `use_cache=False`). Where the plan has a `front`, generate refuses rows
    that do not begin with it.

    Raises:
        RequestError: the plan or the prefix is of another model.
    """
    SinkCache(model.config, plan)
    prepare(model, prefix)
    # A partial, because it is copied with the model: a closure would go on generating from the original.
    model.generate = functools.partial(_generate, model, plan)
    return model


def _generate(model: PreTrainedModel, plan: KVCachePlan, *args: Any, **kwargs: Any) -> Any:
    settings = kwargs.get("generation_config") or model.generation_config
    chosen = ("past_key_values" in kwargs or kwargs.get("cache_implementation", settings.cache_implementation)
              or kwargs.get("use_cache", settings.use_cache) is False)
    if not chosen:
        if plan.front:
            _require_front(plan.front, args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")),
                           kwargs.get("attention_mask"))
        kwargs["past_key_values"] = SinkCache(model.config, plan)
    return type(model).generate(model, *args, **kwargs)


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
