"""A format for every linear before there is a budget: what a recipe asks for, and what it protects."""

from __future__ import annotations

import math

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.artifacts.ends import EndDecision
from sinkquant.errors import RequestError
from sinkquant.policy.activations import with_inputs
from sinkquant.policy.carried import carried, check_recipe
from sinkquant.policy.ends import choose_ends
from sinkquant.policy.engines import for_engine
from sinkquant.policy.input_bits import check_solvable_inputs
from sinkquant.policy.rules import Draft, base_choices, check_group_sizes, protect
from sinkquant.policy.sharing import share_formats
from sinkquant.policy.split import split_channels
from sinkquant.policy.transforms import scale_sinks
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat


def choices_of(shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> tuple[dict[str, Draft], dict[str, Draft]]:
    """A format for every linear before there is a budget: without protection, and with what the recipe protects.

    Raises:
        RequestError: as `make_plan`.
    """
    check_same_model(shape, sink_map)
    check_recipe(recipe)
    check_solvable_inputs(recipe)
    asked = _base(shape, recipe)
    check_group_sizes(asked, shape)
    base = share_formats(with_inputs(asked, shape, recipe), shape)
    protected = scale_sinks(protect(base, shape, sink_map, recipe), shape, sink_map, recipe)
    protected = split_channels(protected, shape, sink_map, recipe)
    found = share_formats(carried(with_inputs(protected, shape, recipe), shape, recipe), shape)
    return for_engine(base, recipe.engine), for_engine(found, recipe.engine)


def formats_asked(shape: ModelShape, recipe: Recipe) -> dict[str, WeightFormat]:
    """Module name -> format of every linear that a recipe packs, as far as that is known before there are sinks.

    Raises:
        RequestError: a pattern matches nothing, or a group size does not fit.
    """
    return {name: choice.form for name, choice in unprotected(shape, recipe).items() if choice.quantized}


def ends_asked(shape: ModelShape, recipe: Recipe) -> dict[str, EndDecision]:
    """How the token embedding and the output head are stored, by module name.

    Raises:
        RequestError: as `make_plan`.
    """
    return choose_ends(shape, recipe, recipe.weights.rotate == "full" and bool(shape.untied))


def unprotected(shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """What the recipe asks for of every linear, stored as its engine wants it, before anything is protected."""
    return for_engine(share_formats(with_inputs(_base(shape, recipe), shape, recipe), shape), recipe.engine)


def _base(shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """The recipe's format for every linear as far as its backend can hold it, before anything is protected."""
    return carried(base_choices(shape, recipe), shape, recipe)


def check_same_model(shape: ModelShape, sink_map: SinkMap) -> None:
    """Refuse the sink map of another model.

    Raises:
        RequestError: it is of another architecture or size, or names linears that the model does not have.
    """
    facts = sink_map.model
    foreign = any(name not in shape.linears for name in sink_map.modules)
    # Persistent buffers count in the shape alone, so that the two numbers may differ a little.
    other_size = not math.isclose(facts.parameters, shape.parameters, rel_tol=0.01)
    if foreign or other_size or facts.layers != shape.blocks or facts.architecture != shape.architecture:
        raise RequestError(f"the sink map is of another model ({facts.name}, {facts.architecture}, {facts.layers} "
                           f"layers, {facts.parameters} parameters); run detect on this one.")
