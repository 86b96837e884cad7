"""The KV cache of serving engines: FP8 with scales in the checkpoint."""

from __future__ import annotations

from sinkquant.artifacts import ModelShape
from sinkquant.artifacts.kv_scheme import KVScheme
from sinkquant.errors import RequestError
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND

OWN_FORMAT = ("sinkquant's own format carries no kv_cache_scheme; set it to null, or protect.channels to another "
              "value.")


def check_kv_scheme(recipe: Recipe) -> None:
    """Refuse what no model's checkpoint could carry."""
    if recipe.kv_cache_scheme is None:
        return
    if recipe.backend != DEFAULT_BACKEND:
        raise RequestError(f"kv_cache_scheme belongs to the files of {DEFAULT_BACKEND}, and {recipe.backend} has no "
                           f"place for it; set it to null, or backend={DEFAULT_BACKEND}.")
    if recipe.kv_cache is not None:
        raise RequestError("kv_cache packs the cache in sinkquant, kv_cache_scheme lets other engines hold it in FP8; "
                           "set one of them to null.")


def make_kv_scheme(shape: ModelShape, recipe: Recipe) -> KVScheme | None:
    """The scheme of a plan, or None where the recipe asks for none.

    Raises:
        RequestError: the model has layers whose keys and values have no place for a scale.
    """
    check_kv_scheme(recipe)
    asked = recipe.kv_cache_scheme
    if asked is None:
        return None
    without = len(shape.kv_layers) - len(shape.attentions)
    if without or any(not layer.heads for layer in shape.kv_layers):
        raise RequestError(f"kv_cache_scheme stores a scale for the keys and the values of every layer, and "
                           f"{shape.architecture} has layers that keep none, or under names that compressed-tensors "
                           "does not know; set it to null.")
    return KVScheme(format=asked.format, strategy=asked.strategy, sinks=asked.sinks)
