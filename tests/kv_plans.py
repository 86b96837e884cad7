"""KV plans for tiny models, made without detection."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan, KVLayer
from sinkquant.models.blocks import kv_layers


def kv_plan(model: PreTrainedModel, bits: int = 2, value_bits: int | None = None, sliding: bool = False,
            **settings: Any) -> KVCachePlan:
    """Blocks of 32 with a window of 32; every full-attention layer is packed, and `sliding` ones too."""
    value_bits = value_bits or bits
    layers = [KVLayer(packed=layer.heads > 0 and (sliding or layer.sliding_window is None),
                      key_bits=[bits] * layer.heads,
                      value_bits=[value_bits] * layer.heads, key_dim=layer.key_dim, value_dim=layer.value_dim,
                      sliding_window=layer.sliding_window, reason="")
              for layer in kv_layers(model.config)]
    given: dict[str, Any] = {"group_size": 32, "window": 32, "symmetric": False, "rotate": False, "exact": "none",
                             "max_exact": 8} | settings
    return KVCachePlan(key_bits=bits, value_bits=value_bits, layers=layers, bits_per_value=0.0, length=1,
                       expected_exact=0, bytes=0, unquantized_bytes=0, reason="", **given)
