"""The sink-aware KV cache: packed for real, exact where the sinks of this prompt are."""

from sinkquant.cache.cache import SinkCache
from sinkquant.cache.files import load_cache, save_cache
from sinkquant.cache.prepare import prepare

__all__ = ["SinkCache", "load_cache", "prepare", "save_cache"]
