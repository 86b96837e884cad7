"""The sink-aware KV cache: packed for real, exact where the sinks of this prompt are."""

from sinkquant.cache.bases import Bases, find_bases, load_bases, needs_bases, save_bases
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.files import load_cache, save_cache
from sinkquant.cache.install import install
from sinkquant.cache.prefix import Prefix, find_prefix, load_prefix, make_prefix, put_in_front, save_prefix
from sinkquant.cache.prepare import given_prefix, prepare
from sinkquant.cache.score import cached_logits
