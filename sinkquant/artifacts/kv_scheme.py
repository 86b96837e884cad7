"""What engines hold the KV cache in by a checkpoint's word: FP8 with stored scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from sinkquant.artifacts.base import Strict
from sinkquant.artifacts.shapes import ModelShape
from sinkquant.schemes.tensors import Tensor

LEAVES = ("k_scale", "v_scale")
"""Behind the name of an attention, as vLLM and compressed-tensors read them."""
Strategy = Literal["tensor", "attn_head"]


class KVScheme(Strict):
    """`strategy` "tensor": one scale for the keys of a layer and one for its values; "attn_head": one for each head.
    `sinks` "exclude": sink tokens do not count in the ranges, and saturate where they reach beyond."""

    format: Literal["fp8"] = "fp8"
    strategy: Strategy = "tensor"
    sinks: Literal["all", "exclude"] = "all"

    def arguments(self) -> dict[str, Any]:
        """compressed-tensors' `QuantizationArgs`, the `kv_cache_scheme` of config.json."""
        return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": self.strategy,
                "group_size": None}

    @classmethod
    def reads(cls, scheme: Mapping[str, Any]) -> bool:
        """Whether the `kv_cache_scheme` of a checkpoint is such a one."""
        own = cls().arguments()
        return (all(scheme.get(key) == own[key] for key in ("num_bits", "type")) and not scheme.get("dynamic")
                and scheme.get("strategy") in get_args(Strategy))

    def scale_shape(self, heads: int) -> list[int]:
        """Of one scale tensor."""
        return [1] if self.strategy == "tensor" else [heads, 1, 1]


def kv_scale_tensors(shape: ModelShape, scheme: KVScheme | None) -> dict[str, Tensor]:
    """The scales of a checkpoint by their names, in the model's dtype."""
    if scheme is None:
        return {}
    return {f"{name}.{leaf}": (shape.dtype, scheme.scale_shape(heads))
            for name, heads in shape.attentions.items() for leaf in LEAVES}


def with_kv_scales(shape: ModelShape, scheme: KVScheme | None) -> ModelShape:
    """The shape with the scales that a checkpoint stores."""
    return shape.model_copy(update={"tensors": shape.tensors | kv_scale_tensors(shape, scheme)})
