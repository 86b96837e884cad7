"""Every kind of protection alone: a plan with it, and one of the same bytes without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from sinkquant.artifacts import ModelShape, ModuleDecision, Plan, SinkMap
from sinkquant.errors import RequestError
from sinkquant.policy.kv_cache import make_kv_control
from sinkquant.policy.plan import make_control, make_plan
from sinkquant.recipe import Recipe
from sinkquant.recipe.cache import FIRST_N

OFF = ["protect.tokens=false", "protect.channels=none", "protect.modules=[]", "activations.sinks=all"]
"""Nothing in the weights is done for the sinks."""
ALONE = ["weights.ignore=['*']", "weights.overrides=[]", "weights.rotate=none", "weights.smooth=none",
         "prune={}", "activations={}", "budget={}"]
"""The weights stay as they are."""
UNPINNED = ["kv_cache.exact=none", f"kv_cache.first_n={FIRST_N}", "kv_cache.prefix=none",
            "kv_cache.sliding_sinks=false"]
"""No token stays exact in the cache."""
OUTLIERS = "prefix of the outlier tokens"
"""The kind of protection that there is only where such tokens were found."""
PREFIX = "kv_cache={key_bits: 16, value_bits: 16, exact: none, prefix: bos}"
"""A cache that is not packed, with the prefix."""


@dataclass(frozen=True)
class Mechanism:
    """One kind of protection, with nothing else quantized than what it protects.

    Attributes:
        settings: what turns it on in a recipe. recipe: what is quantized; for the cache with nothing turned on.
        aware, control: null where it cannot be had, or where it would keep nothing.
        why: the reason for that. possible: whether it could be had at all.
        statistics: the policy that weighs tokens, where the mechanism is that.
        exact_sinks: both keep the keys and values of the sinks, or the plan with the mechanism does ("aware"); "some":
            a prefix keeps those of some sinks and not of others.
    """

    name: str
    applies_to: Literal["weights", "KV cache"]
    settings: list[str]
    aware: Plan | None = None
    control: Plan | None = None
    why: str = ""
    possible: bool = True
    statistics: str | None = None
    exact_sinks: Literal["none", "aware", "both", "some"] = "none"
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def has_own_losses(self) -> bool:
        """Whether it makes other codes of the same format, or has columns beside them."""
        return self.statistics is not None or self.recipe.protect.channels == "split"


def unprotected(recipe: Recipe) -> Recipe:
    """The recipe's weights alone, with nothing done for the sinks. A budget that is spent evenly stays.

    Raises:
        RequestError: it has a budget that is solved for.
    """
    if recipe.solves_inputs:
        raise RequestError("activations.bits takes what inputs lose, which every kind of protection changes; leave it "
                           "out to be advised.")
    if recipe.solves_cache:
        raise RequestError("kv_cache.bits gives heads other bits with every kind of protection; leave it out to be "
                           "advised.")
    if recipe.budget.solved:
        raise RequestError("a budget that is solved for takes other formats with every kind of protection, so that "
                           "what one is worth alone cannot be told; set budget.solver=even, or leave the budget out.")
    return recipe.model_copy(update={"kv_cache": None}).replace(OFF)


def mechanisms(shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> list[Mechanism]:
    """All kinds of protection under the recipe's formats.

    Raises:
        RequestError: the recipe has a budget that is solved for, or quantizes neither weights nor cache, or does not
            fit the model.
    """
    found: list[Mechanism] = []
    weights = unprotected(recipe)
    packed = False
    if recipe.kv_cache is None or make_plan(shape, sink_map, recipe.replace([*OFF, *UNPINNED])).formats:
        found += _for_weights(shape, sink_map, recipe, weights)
        packed = True
    if recipe.kv_cache is not None and (recipe.kv_cache.key_bits < 16 or recipe.kv_cache.value_bits < 16
                                        or recipe.kv_cache.overrides):
        found += _for_cache(shape, sink_map, recipe)
        packed = True
    if not packed:
        raise RequestError("the recipe quantizes neither weights nor the KV cache; there is nothing to protect.")
    return found


def _for_weights(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, off: Recipe) -> list[Mechanism]:
    base = make_plan(shape, sink_map, off)
    found = []
    for keep, name in (("split", "split columns"), ("module", "whole linears in more bits"),
                       ("scale", "scaled columns")):
        settings = [f"protect.channels={keep}"]
        named = [f"protect.modules={json.dumps(recipe.protect.modules)}"] if keep == "module" else []
        asked = off.replace([*settings, *named])
        found.append(_kept(name, settings, asked, shape, sink_map, keep))
    for statistics, name in (("boost", "boosted statistics"), ("cap", "capped statistics"),
                             ("attention", "statistics by attention")):
        settings = ["protect.tokens=true", f"protect.statistics={statistics}"]
        found.append(_weighted(name, settings, statistics, off, base, shape, sink_map))
    settings = ["kv_cache.prefix=bos"]
    with_prefix, covered = off.replace([PREFIX]), _in_prefix(sink_map)
    found.append(_made(Mechanism("prefix", "weights", settings, exact_sinks="aware" if covered else "some", recipe=off),
                       lambda: (make_plan(shape, sink_map, with_prefix), base)))
    settings = ["kv_cache.prefix=bos", "protect.tokens=true", "protect.statistics=exclude"]
    excluded = Mechanism("excluded statistics beside the prefix", "weights", settings, statistics="exclude",
                         exact_sinks="both" if covered else "some", recipe=off.replace(settings[1:]))
    found.append(_takes_none(excluded, base) or _made(excluded, lambda: (
        make_plan(shape, sink_map, with_prefix.replace(settings[1:])), make_plan(shape, sink_map, with_prefix))))
    if recipe.activations.format != "16-bit" and recipe.activations.ranged:
        grouped = recipe.activations.scale == "group"  # sinks have scales of their own already
        how = "16-bit" if recipe.activations.sinks == "16-bit" or grouped else "dynamic"
        spared = _made(Mechanism("static ranges without the sinks", "weights", [f"activations.sinks={how}"],
                                 recipe=off),
                       lambda: (make_plan(shape, sink_map, off.replace([f"activations.sinks={how}"])), base))
        found.append(spared if spared.aware is None or _differ(spared.aware, base) else Mechanism(
            spared.name, "weights", spared.settings, why="no linear has a range that sinks set"))
    return found


def _in_prefix(sink_map: SinkMap) -> bool:
    """Whether `<bos>` in front of a row is all sinks that there are."""
    return all(token.position == 0 for token in sink_map.placed)


def _kept(name: str, settings: list[str], asked: Recipe, shape: ModelShape, sink_map: SinkMap,
          keep: str) -> Mechanism:
    """A way to keep channels, beside a control on which the same bytes are spent evenly."""
    def plans() -> tuple[Plan, Plan]:
        aware = make_plan(shape, sink_map, asked)
        return aware, make_control(shape, sink_map, asked, aware)

    made = _made(Mechanism(name, "weights", settings, recipe=asked), plans)
    if made.aware is None or any(decision.keep == keep for decision in made.aware.modules.values()):
        return made
    return Mechanism(name, "weights", settings, why="no linear has a range that sinks set or a super weight, of which "
                                                    "this could keep any")


def _weighted(name: str, settings: list[str], statistics: str, off: Recipe, base: Plan, shape: ModelShape,
              sink_map: SinkMap) -> Mechanism:
    """A policy that says what tokens weigh, beside one token like another."""
    asked = off.replace(settings)
    one = Mechanism(name, "weights", settings, statistics=statistics, recipe=asked)
    if not base.needs_rows:
        return _takes_none(one, base) or one
    if statistics != "attention" and not sink_map.placed:
        return Mechanism(name, "weights", settings, why="no token is a sink whose weight could be changed")
    return _made(one, lambda: (make_plan(shape, sink_map, asked), base))


def _takes_none(one: Mechanism, base: Plan) -> Mechanism | None:
    """The mechanism as one that keeps nothing, where the plan takes no statistics at all."""
    if base.needs_rows:
        return None
    return Mechanism(one.name, one.applies_to, one.settings, why="what this recipe does to the weights takes no "
                                                                 "statistics (GPTQ, AWQ and SmoothQuant do)")


def _for_cache(shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> list[Mechanism]:
    """Ways to keep tokens of the cache, the weights left alone, beside a window that is longer by the same bytes."""
    assert recipe.kv_cache is not None
    # Planned for the rows that measure it: there a longer window takes the bytes that exact tokens do.
    off = recipe.replace([*OFF, *ALONE, *UNPINNED, f"kv_cache.length={recipe.evaluate.divergence_length}"])

    def plans(settings: list[str]) -> Callable[[], tuple[Plan, Plan]]:
        def made() -> tuple[Plan, Plan]:
            aware = make_plan(shape, sink_map, off.replace(settings))
            return aware, aware.model_copy(update={"name": "control", "kv_cache": make_kv_control(aware.kv_cache)})

        return made

    exact = recipe.kv_cache.exact if recipe.kv_cache.exact != "none" else "detected"
    first = [f"kv_cache.first_n={recipe.kv_cache.first_n}"] if exact == "first-n" else []
    tokens = Mechanism("exact tokens", "KV cache", [f"kv_cache.exact={exact}", *first])
    if exact == "detected" and not sink_map.placed:
        found = [Mechanism(tokens.name, "KV cache", tokens.settings, why="no token of a prompt is a sink")]
    else:
        found = [_made(replace(tokens, recipe=off), plans(tokens.settings))]
    found.append(_made(Mechanism("prefix", "KV cache", ["kv_cache.prefix=bos"], recipe=off),
                       plans(["kv_cache.prefix=bos"])))
    prefix = sink_map.outlier_prefix
    if prefix is not None and len(prefix.token_ids) > int(sink_map.tokenization.rows_start_with_bos):
        found.append(_made(Mechanism(OUTLIERS, "KV cache", ["kv_cache.prefix=found"], recipe=off),
                           plans(["kv_cache.prefix=found"])))
    return found


def _made(one: Mechanism, plans: Callable[[], tuple[Plan, Plan]]) -> Mechanism:
    """The mechanism with its plans; with the reason where the model or the recipe cannot have it."""
    try:
        aware, control = plans()
    except RequestError as error:
        return Mechanism(one.name, one.applies_to, one.settings, why=str(error).rstrip("."), possible=False)
    return replace(one, aware=aware, control=control)


def _differ(a: Plan, b: Plan) -> bool:
    def decided(one: ModuleDecision) -> dict[str, object]:
        return one.model_dump(exclude={"reason"})

    return any(decided(a.modules[name]) != decided(b.modules[name]) for name in a.modules)
