"""What shapes and recipe alone tell: a plan, or what no sink map could make possible. No weight is read, nothing is
detected."""

from __future__ import annotations

from sinkquant.artifacts import ModelFacts, ModelShape, Plan, SinkMap, TokenizationFacts
from sinkquant.artifacts.distill import require_tunable
from sinkquant.policy.activations import spares, with_inputs
from sinkquant.policy.carried import carried
from sinkquant.policy.choices import choices_of
from sinkquant.policy.edited import accept_edited
from sinkquant.policy.engines import require_engine_cache, require_engine_names
from sinkquant.policy.input_bits import require_input_bits
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.policy.kv_scheme import make_kv_scheme
from sinkquant.policy.plan import make_plan
from sinkquant.policy.rules import base_choices
from sinkquant.policy.split import check_split
from sinkquant.policy.transforms import require_transforms
from sinkquant.policy.within import check_budget
from sinkquant.recipe import Budget, KVCache, Recipe

FOR_SINKS = frozenset({"boost", "cap", "exclude"})
"""Policies of `protect.statistics` that treat detected sinks in a way of their own."""


def plan_from_shapes(shape: ModelShape, recipe: Recipe) -> tuple[Plan | None, list[str]]:
    """The plan that `make_plan` would make with any sink map, where the recipe takes nothing from it; reasons do not
    tell of sinks that nobody looked for.

    Returns:
        the plan and an empty list; or None and the settings that take what only detection finds.

    Raises:
        RequestError: as `make_plan`.
    """
    asking = _asking(shape, recipe)
    if asking:
        return None, asking
    plan = make_plan(shape, nothing_found(shape), recipe).made_from(None)
    if plan.needs_rows and recipe.statistics in FOR_SINKS:
        return None, ["protect.tokens"]
    return plan, []


def plan_ready(shape: ModelShape, recipe: Recipe, edited: Plan | None,
               sink_map: SinkMap | None) -> tuple[Plan | None, list[str]]:
    """The plan, where headers and configuration are enough to make it.

    Args:
        edited, sink_map: the plan and the sink map that were given, if any.

    Returns:
        the plan and an empty list; or None and the settings that ask for detection or sensitivities.

    Raises:
        RequestError: the plan cannot be made for this model.
    """
    if edited is not None:
        return accept_edited(edited, shape), []
    if recipe.prune.blocks is not None:
        return None, ["prune.blocks"]
    if recipe.solves_cache:
        return None, ["kv_cache.bits"]
    if recipe.budget.solved:
        return None, ["budget"]
    if recipe.solves_inputs:
        return None, ["activations.bits"]
    if sink_map is not None:
        return make_plan(shape, sink_map, recipe), []
    return plan_from_shapes(shape, recipe)


def require_plannable(shape: ModelShape, recipe: Recipe) -> None:
    """Refuse what no sink map could make possible, before anything is detected."""
    for engine in (recipe.engine, recipe.budget.engine):
        require_engine_names(engine, shape)
    require_transforms(shape, recipe)
    require_distill(shape, recipe)
    changes = ["prune.heads=none"]  # detection says which
    if recipe.kv_cache is not None:
        changes += _any_tokens(recipe.kv_cache)
        if recipe.kv_cache.prefix != "none":  # detection says whether rows begin with it
            changes += ["activations.sinks=all"] if recipe.activations.sinks == "exclude" else []
            changes += ["protect.statistics=all"] if recipe.protect.statistics == "exclude" else []
        if recipe.sensitivity.kv_bits and recipe.budget.context is not None:  # the fewest that the budget may choose
            changes += [f"kv_cache.{kind}_bits={min(recipe.sensitivity.kv_bits)}" for kind in ("key", "value")]
    nothing, plain = nothing_found(shape), recipe.replace(changes)
    cache = make_kv_plan(shape, nothing, plain)  # its bits take sensitivities; whether the fewest are few enough none
    require_engine_cache(recipe.engine, cache, make_kv_scheme(shape, recipe))
    check_budget(shape, nothing, recipe, cache)
    check_split(recipe)
    if recipe.prune.heads != "none" and recipe.kv_cache is None and not recipe.methods and not plain.prune.asked:
        return  # heads are all that it works on
    if recipe.solves_inputs:  # as of the cache
        require_input_bits(choices_of(shape, nothing, plain)[1], plain)
        plain = plain.changed(activations={"bits": None})
    if recipe.solves_cache:
        plain = plain.changed(kv_cache={"bits": None})
    # What is solved for may become another plan than the one without a budget, which its engine need not run.
    engine = "any" if recipe.budget.solved else recipe.engine
    make_plan(shape, nothing, plain.model_copy(update={"budget": Budget(), "engine": engine}))


def _any_tokens(cache: KVCache) -> list[str]:
    """Settings that take no exact token of what only detection finds. First tokens stand for them where sliding windows
    are to see some."""
    if cache.sliding_sinks and cache.exact != "massive" and (cache.prefix != "none" or cache.exact == "detected"):
        most = max(cache.max_exact, int(cache.prefix != "none"))
        return ["kv_cache.exact=first-n", f"kv_cache.max_exact={most}", "kv_cache.prefix=none"]
    found = cache.exact == "detected" or (cache.exact == "massive" and not cache.sliding_sinks)
    return [*(["kv_cache.exact=none"] if found else []), "kv_cache.prefix=none"]


def _asking(shape: ModelShape, recipe: Recipe) -> list[str]:
    """Settings that decide on bits and bytes by what was detected."""
    found = []
    if recipe.protect.channels != "none":
        found.append("protect.channels")
    if recipe.prune.heads != "none":
        found.append("prune.heads")
    if (recipe.prune.method != "none" and not recipe.prune.massive
            and any(linear.part_of for linear in shape.linears.values())):
        found.append("prune.method")  # spares the experts that make massive activations
    rounded = recipe.activations
    if rounded.format != "16-bit" and spares(rounded):
        found.append("activations.sinks")
    if recipe.budget != Budget():
        found.append("budget")
    if recipe.kv_cache_scheme is not None and recipe.kv_cache_scheme.sinks == "exclude":
        found.append("kv_cache_scheme.sinks")
    if recipe.kv_cache is not None:
        found += ["kv_cache.bits"] if recipe.solves_cache else []
        found += ["kv_cache.exact"] if recipe.kv_cache.exact in ("detected", "massive") else []
        found += ["kv_cache.prefix"] if recipe.kv_cache.prefix != "none" else []
    return found


def nothing_found(shape: ModelShape) -> SinkMap:
    """A sink map without a finding, for a recipe that does not look into it."""
    facts = ModelFacts(name=shape.name, architecture=shape.architecture, layers=shape.blocks, heads=0, kv_heads=0,
                       hidden_size=0, parameters=shape.parameters, dtype=shape.dtype)
    return SinkMap(model=facts, tokenization=TokenizationFacts(bos_token_id=None, adds_bos="none",
                                                               rows_start_with_bos=False, rows=0, length=0),
                   sink_rate={}, sink_rate_repeated_token={}, thresholds={}, tokens=[], heads=[], channels=[],
                   super_weights=[], modules={})


def require_distill(shape: ModelShape, recipe: Recipe) -> None:
    """Raises RequestError where `weights.distill` cannot be done on this model; protection changes nothing in that."""
    if not recipe.weights.distill:
        return
    choices = with_inputs(carried(base_choices(shape, recipe), shape, recipe), shape, recipe)
    prefix = recipe.kv_cache is not None and recipe.kv_cache.prefix != "none"
    require_tunable({name: choice.form for name, choice in choices.items() if choice.quantized}, shape,
                    prefix and recipe.activations.format != "16-bit", recipe.weights.distill_codes)
