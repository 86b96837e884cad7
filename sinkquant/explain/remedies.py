"""Cause -> the recipe change that mends it, or what to do where no recipe is to blame."""

from __future__ import annotations

from typing import Any

BROKEN = "no recipe makes this: the file was written or read wrong; convert the model again"


def remedy(kind: str, where: str) -> dict[str, Any]:
    """`recipe` and `advice` of a cause. where: module name, or a pattern of them."""
    exact = f"weights.ignore=[{where!r}]"
    found: dict[str, tuple[list[str], str]] = {
        "super weight": (["protect.channels=split", f"protect.modules=[{where!r}]"],
                         "keep the weight in 16 bits beside the codes, or give its module more bits"),
        "sink columns": (["protect.channels=split", f"protect.modules=[{where!r}]"],
                         "keep the columns that the sinks set in 16 bits beside the codes"),
        "columns": ([exact], "leave the module in 16 bits"),
        "outlier scale": (["weights.group_size=32"], "let fewer weights share a scale"),
        "module": ([f"weights.overrides=[{{pattern: {where!r}, bits: 8}}]"], "give the module more bits"),
        "role": ([f"weights.overrides=[{{pattern: {where!r}, bits: 8}}]"], "give these modules more bits"),
        "embedding": ([], "leave the token embedding in 16 bits, as every recipe of sinkquant does"),
        "head": ([], "leave the output head in 16 bits, as every recipe of sinkquant does"),
        "learned sinks": ([], "leave the learned sinks as they are; they are one number per head"),
        "kv cache": (["kv_cache.key_bits=4", "kv_cache.value_bits=4"], "give the cache more bits"),
        "inputs": (["activations.format=16-bit"], "leave the inputs of linears alone"),
        "sinks": (["protect.tokens=true", "protect.sink_weight=16"], "let the sink tokens weigh more in calibration"),
        "order": ([], BROKEN), "rope": ([], BROKEN), "scales": ([], BROKEN),
    }
    recipe, advice = found[kind]
    return {"recipe": recipe, "advice": advice}
