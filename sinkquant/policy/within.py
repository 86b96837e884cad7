"""A budget of bits or bytes: refused early where nothing meets it, and what it leaves to the linears."""

from __future__ import annotations

import math
from dataclasses import replace

from sinkquant.artifacts import KVCachePlan, ModelShape, SinkMap
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED
from sinkquant.policy.allocate import check_engine, no_candidate, way_out
from sinkquant.policy.budget import choice_bytes, evenly_spread, fill, linear_bytes
from sinkquant.policy.choices import choices_of
from sinkquant.policy.ends import end_options, sized
from sinkquant.policy.engines import engine_loads
from sinkquant.policy.kv_budget import kv_bytes_of
from sinkquant.policy.rules import Draft, affected
from sinkquant.policy.sharing import share_formats
from sinkquant.policy.solvable import bits_tried, groups_tried
from sinkquant.policy.solver import ROUNDS
from sinkquant.recipe import Recipe
from sinkquant.schemes import scheme_of
from sinkquant.schemes.tensors import total_bytes


def check_budget(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, kv_cache: KVCachePlan | None) -> None:
    """Refuse a budget of bits or bytes where the fewest are over it, whatever is detected. One that is solved for may
    choose the smallest formats that are tried and its engine loads; where it loads none, any budget is refused.

    Args:
        kv_cache: in the fewest bits that the budget may choose.

    Raises:
        RequestError: as `make_plan`.
    """
    if not recipe.budget.limited:
        return
    base, choices = choices_of(shape, sink_map, recipe)
    if recipe.budget.solved:
        free = [name for name, choice in base.items() if choice.quantized and not choice.pinned]
        base = {name: _smallest_tried(name, choice, shape, recipe) for name, choice in base.items()}
        if free and not any(base[name].quantized for name in free):
            raise no_candidate(shape, recipe.budget.engine)
        recipe = min(end_options(shape, recipe, recipe.budget.engine),
                     key=lambda one: total_bytes(sized(shape, one).tensors.values()))
        check_engine(base, shape, recipe)
    if recipe.budget.loss is None:
        kept = kv_cache.model_copy(update={"expected_exact": 0}) if kv_cache is not None else None
        _room(base, choices, shape, recipe, kv_bytes_of(shape, recipe.budget, kept))


def _smallest_tried(name: str, choice: Draft, shape: ModelShape, recipe: Recipe) -> Draft:
    """A linear in the smallest format that a solved budget could bring it to, the recipe having fixed nothing of it;
    in 16 bits where the engine loads none."""
    if choice.pinned or not choice.quantized:
        return choice
    linear = shape.linears[name]
    tried = [replace(choice, bits=bits, group_size=scheme_of(choice.form).fitted(bits, size, linear.columns))
             for bits in bits_tried(recipe) for size in groups_tried(recipe, [linear.columns], name)]
    loads = [one for one in tried if engine_loads(recipe.budget.engine, one.form, linear)]
    return min(loads, key=lambda one: choice_bytes(shape, name, one),
               default=replace(choice, bits=16, group_size=None, method=UNTOUCHED))


def _room(base: dict[str, Draft], choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
          kv_bytes: int = 0) -> tuple[dict[str, Draft], int, str]:
    """The formats that take the fewest bytes, the bytes that the budget leaves to the linears, and its name.

    Args:
        kv_bytes: of the KV cache, as far as the budget counts it.

    Raises:
        RequestError: these formats take more.
    """
    named = {name: choice for name, choice in choices.items() if choice.keep and choice.pinned}
    floor = share_formats(base | named, shape)
    least = linear_bytes(shape, floor)
    whole = recipe.budget.whole(shape.values)
    if recipe.budget.solved:
        takes, other = "the smallest candidates and what the recipe fixes take", way_out(recipe.budget)
    else:
        takes = "weights.bits and weights.group_size, and what stays in 16 bits, take"
        other = "lower weights.bits"
    if whole is not None:
        smallest = checkpoint_bytes(sized(shape, recipe), {name: c.form for name, c in floor.items() if c.quantized})
        allowed, words = whole - kv_bytes - (smallest - least), f"the budget of {whole:,} bytes"
        if least > allowed:
            (key,), asked = recipe.budget.limits, recipe.budget.in_words(whole, shape.values)
            cache = f" and {kv_bytes:,} of the KV cache" if kv_bytes else ""
            # How many tokens a packed cache keeps exact, detection tells.
            beyond = "more than " if kv_bytes and recipe.kv_cache is not None else ""
            raise RequestError(f"budget.{key} {asked} is not feasible: {takes} a checkpoint of {smallest:,} bytes "
                               f"without any protection{cache}; raise budget.{key} to {beyond}"
                               f"{recipe.budget.in_words(smallest + kv_bytes, shape.values)}, or {other}.")
    else:
        bits = recipe.budget.limits["bits"]
        allowed, words = int(bits * shape.weights / 8), f"the budget of {recipe.budget.bits} bits"
        if least > allowed:
            # Rounded up, so that the number in the message is itself feasible.
            fewest = math.ceil(8000 * least / shape.weights) / 1000
            raise RequestError(f"budget.bits {bits:g} is not feasible: {takes} {fewest:.3f} bits per weight without "
                               f"any protection; raise budget.bits to that, or {other}.")
    return floor, allowed, words


def within_budget(base: dict[str, Draft], choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap,
                   recipe: Recipe) -> dict[str, Draft]:
    floor, allowed, words = _room(base, choices, shape, recipe)
    order = [name for name, _ in affected(shape, sink_map)]
    order += [name for name in evenly_spread(list(shape.linears)) if name not in order]
    # Protections that the budget cannot pay are given up from the least affected on.
    for name in reversed(order):
        if linear_bytes(shape, choices) <= allowed:
            break
        if choices[name].keep not in (None, "scale") and not choices[name].pinned:
            choices = choices | {
                member: replace(floor[member], reason=f"{floor[member].bits} bits: {words} does not pay for its "
                                                      f"protection ({choices[member].why})")
                for member in shape.linears[name].fused_with or [name]}
    whole, spent = recipe.budget.whole(shape.values), linear_bytes(shape, choices)
    filled = fill(choices, shape, allowed - spent, order, f"{words} allows it", recipe.engine)
    for _ in range(ROUNDS if whole is not None else 0):
        packed = {n: c.form for n, c in filled.items() if c.quantized}
        over = checkpoint_bytes(sized(shape, recipe), packed) - (whole or 0)
        if over <= 0:
            break
        # The header of the files is longer for longer numbers.
        filled = fill(choices, shape, max(0, linear_bytes(shape, filled) - over - spent), order, f"{words} allows it",
                      recipe.engine)
    return filled
