"""Gives a model a KV cache of its own: what `generate` uses when it is handed none."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.prefix import Prefix
from sinkquant.cache.prepare import prepare


def install(model: PreTrainedModel, plan: KVCachePlan, prefix: Prefix | None = None) -> PreTrainedModel:
    """Prepare a model, and let its `generate` start from a new SinkCache where the call names no cache of its own
    (`past_key_values`, `cache_implementation`, `use_cache=False`).

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
        kwargs["past_key_values"] = SinkCache(model.config, plan)
    return type(model).generate(model, *args, **kwargs)
