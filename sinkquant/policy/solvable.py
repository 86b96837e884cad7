"""What a budget can be solved for, and in which formats, told by the recipe alone."""

from __future__ import annotations

from collections.abc import Collection

from sinkquant.errors import RequestError
from sinkquant.policy.carried import scheme_for
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND, INTEGERS, Scheme
from sinkquant.schemes.inputs import NO_ROUNDING
from sinkquant.schemes.registry import all_schemes, find, multiplied_with, of_backend


def check_solvable(recipe: Recipe) -> None:
    """Refuse a budget that is solved for where sensitivities say nothing about what the recipe does.

    Raises:
        RequestError: weights that are changed before they are quantized, FP8, a backend whose linears cannot differ, or
            bits of a KV cache that there is not, that is not counted or that has a budget of its own.
    """
    weights = recipe.weights
    for key, value in (("rotate", weights.rotate), ("smooth", weights.smooth)):
        if value != "none":
            raise RequestError(f"weights.{key}={value} changes the weights that sensitivities are taken of; set it to "
                               "none, or budget.solver=even.")
    if recipe.sensitivity.end_bits and recipe.budget.bits is not None:
        raise RequestError("budget.bits counts the blocks' linears alone, so that it cannot choose bits of the head "
                           "and the embedding; name budget.bytes, megabytes or bits_per_parameter, or leave "
                           "sensitivity.end_bits out.")
    if recipe.sensitivity.kv_bits:
        _check_cache(recipe)
    scheme = scheme_for(recipe)
    if recipe.sensitivity.end_bits and scheme.foreign:
        held = any(one.ends != NO_ROUNDING for one in of_backend(recipe.backend))
        raise RequestError(f"sensitivity.end_bits is for the backend {DEFAULT_BACKEND}, not for {recipe.backend}; "
                           f"leave it out{': a budget counts both as weights.ends stores them' if held else ''}.")
    multiplied = scheme if scheme.foreign else multiplied_with(scheme, recipe.activations.format)
    if scheme.foreign and not scheme.solvable:
        backends = dict.fromkeys(one.backend for one in all_schemes() if one.solvable)
        raise RequestError(f"a budget is solved for in the formats of {' and '.join(backends)}, not of "
                           f"{recipe.backend}; use one of these, or set budget.solver=even.")
    if not multiplied.solvable:
        raise RequestError(f"{multiplied.words} have one format, so that there is nothing to solve for; leave the "
                           "budget out.")


def _check_cache(recipe: Recipe) -> None:
    """Refuse bits of the KV cache that the budget cannot choose."""
    if recipe.kv_cache is None:
        raise RequestError("sensitivity.kv_bits asks for losses of a packed KV cache, and the recipe has no section "
                           "kv_cache; add one, or leave kv_bits out.")
    if recipe.solves_cache and recipe.budget.context is None:
        return  # the budget counts the linears alone, kv_cache.bits the cache
    if recipe.solves_cache:
        raise RequestError("kv_cache.bits and a budget with sensitivity.kv_bits both choose the bits of the KV cache; "
                           "leave one of them out.")
    if recipe.budget.context is None:
        raise RequestError("sensitivity.kv_bits lets a budget choose the bits of the KV cache, and this one does not "
                           "count its bytes; name budget.bytes and budget.context, or leave kv_bits out.")


def bits_tried(recipe: Recipe) -> list[int]:
    """Numbers of bits that linears are tried in: those of `sensitivity.bits` that the recipe's number format has.

    Raises:
        RequestError: it has none of them.
    """
    scheme = tried_in(recipe)
    found = sorted(set(recipe.sensitivity.bits) & set(scheme.bits))
    if not found:
        raise RequestError(f"{scheme.words} have {' or '.join(map(str, scheme.bits))} bits, and sensitivity.bits names "
                           "none of them; add some.")
    return found


def groups_tried(recipe: Recipe, columns: Collection[int], name: str) -> list[int]:
    """Group sizes that linears of so many input columns are tried in together, `name` the first of them.

    Raises:
        RequestError: none divides them all.
    """
    sizes = list(dict.fromkeys(recipe.sensitivity.group_sizes or [recipe.weights.group_size]))
    fitting = [size for size in sizes if size == -1 or not any(one % size for one in columns)]
    if not fitting:
        raise RequestError(f"no group size of {sizes} divides the {max(columns)} input columns of {name}; "
                           "change weights.group_size or sensitivity.group_sizes.")
    return fitting


def tried_in(recipe: Recipe) -> Scheme:
    """The number format whose losses are taken: the recipe's own, or plain integers where none is solved for there."""
    scheme = scheme_for(recipe)
    return find(scheme.tried_as) if scheme.solvable else INTEGERS
