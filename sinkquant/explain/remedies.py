"""Cause -> the recipe change that mends it, or what to do where no recipe is to blame."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import yaml

from sinkquant.artifacts.kv import KV_BITS
from sinkquant.errors import RequestError
from sinkquant.policy.carried import scheme_for
from sinkquant.policy.engines import ANY
from sinkquant.policy.rules import matches
from sinkquant.policy.split import check_split
from sinkquant.recipe import KVCache, Recipe

BROKEN = "no recipe makes this: the file was written or read wrong; convert the model again"
ADVICE = {
    "super weight": "keep the weight in 16 bits beside the codes, or give its module more bits",
    "sink columns": "keep the columns that the sinks set in 16 bits beside the codes, or give the module more bits",
    "columns": "leave the module in 16 bits", "outlier scale": "let fewer weights share a scale",
    "module": "give the module more bits", "role": "give these modules more bits",
    "embedding": "leave the token embedding in 16 bits", "head": "leave the output head in 16 bits",
    "both ends": "leave the token embedding and the output head in 16 bits",
    "learned sinks": "leave the learned sinks as they are; they are one number per head",
    "kv cache": "give the cache more bits", "inputs": "leave the inputs of linears alone",
    "sinks": "let the sink tokens weigh more in calibration", "order": BROKEN, "rope": BROKEN, "scales": BROKEN,
}
Changes = list[tuple[str, bool]]


def remedy(kind: str, where: str, recipe: Recipe, experts: Iterable[str] = ()) -> dict[str, Any]:
    """`recipe` and `advice` of a cause: the assignments that change anything, lists with what the recipe has in them.

    Args:
        where: module name, or a pattern of them. recipe: what the checkpoint was made with. experts: names of the
            model's packed experts.
    """
    where = re.sub(r"\.experts\.\w+$", ".experts.*", where)  # in a plan every expert has linears of its own
    changed = [one for one, changes in _changes(where, recipe, experts).get(kind, []) if changes]
    return {"recipe": appended(changed, recipe), "advice": ADVICE[kind]}


def appended(assignments: list[str], recipe: Recipe) -> list[str]:
    """Lists go behind those that the recipe has."""
    known: dict[str, list[Any]] = {
        "weights.ignore": recipe.weights.ignore, "protect.modules": recipe.protect.modules,
        "weights.overrides": [one.model_dump(exclude_none=True) for one in recipe.weights.overrides]}
    found = []
    for one in assignments:
        key, _, value = one.partition("=")
        before = known.get(key)
        # JSON is YAML whose backslashes, which patterns are full of, are read as they are written.
        found.append(f"{key}={json.dumps([*before, *yaml.safe_load(value)])}" if before else one)
    return found


def _changes(where: str, recipe: Recipe, experts: Iterable[str]) -> dict[str, Changes]:
    """Kind -> assignments, each with whether it changes the recipe."""
    weights, protect, inputs, cache = recipe.weights, recipe.protect, recipe.activations, recipe.kv_cache or KVCache()
    bits = _bits(where, recipe)
    scheme = scheme_for(recipe)
    more = max(scheme.bits) if scheme.mixed and bits < max(scheme.bits) else 16
    ends = ("weights.ends=16-bit", weights.ends != "16-bit")
    embedding, head = ((f"weights.{key}=16", held < 16)
                       for key, held in (("embeddings", weights.embeddings), ("lm_head", weights.lm_head)))
    split: Changes = [("protect.channels=split", protect.channels != "split"),
                      (f"protect.modules=[{where!r}]", not any(matches(one, where) for one in protect.modules))]
    module: Changes = [(f"weights.overrides=[{{pattern: {where!r}, bits: {more}}}]", bits < 16)]
    split = split if _splits(recipe, experts) else module
    packed = [("bits", cache.bits)] if cache.bits else [("key_bits", cache.key_bits), ("value_bits", cache.value_bits)]
    return {
        "super weight": split, "sink columns": split, "columns": [(f"weights.ignore=[{where!r}]", bits < 16)],
        "outlier scale": [("weights.group_size=32", scheme.group_size is None and not 0 < weights.group_size <= 32)],
        "module": module, "role": module,
        "embedding": [embedding, ends], "head": [head, ends], "both ends": [embedding, head, ends],
        "kv cache": [(f"kv_cache.{key}={_more(held)}", held < 16) for key, held in packed],
        "inputs": [("activations.bits=null", inputs.bits is not None),
                   ("activations.format=16-bit", inputs.format != "16-bit")],
        "sinks": [("protect.tokens=true", not protect.tokens), ("protect.sink_weight=16", protect.sink_weight < 16)],
    }


def _splits(recipe: Recipe, experts: Iterable[str]) -> bool:
    """Whether the recipe takes `protect.channels: split`, and sinkquant's own format all else that it asks for."""
    if (min(recipe.weights.lm_head, recipe.weights.embeddings) < 16 or recipe.kv_cache_scheme is not None
            or recipe.engine != ANY or any(_bits(one, recipe) < 16 for one in experts)):
        return False
    try:
        check_split(recipe.changed(protect={"channels": "split"}))
    except RequestError:
        return False
    return True


def _more(bits: float) -> int:
    """The next larger kind of a cache."""
    return next((kind for kind in KV_BITS if kind > bits), KV_BITS[-1])


def _bits(where: str, recipe: Recipe) -> int:
    """What the recipe gives a module, or all modules of a pattern."""
    if any(matches(pattern, where) for pattern in recipe.weights.ignore):
        return 16
    own = [one.bits for one in recipe.weights.overrides if matches(one.pattern, where)]
    raised = [recipe.protect.bits for pattern in recipe.protect.modules if matches(pattern, where)]
    return max([own[-1] if own else recipe.weights.bits, *raised])
