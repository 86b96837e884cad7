"""End-to-end tuning that a recipe asks for and the model does not allow, before the sinks are looked for."""

from __future__ import annotations

from sinkquant.artifacts import ModelShape
from sinkquant.artifacts.distill import require_tunable
from sinkquant.policy.activations import with_inputs
from sinkquant.policy.carried import carried
from sinkquant.policy.rules import base_choices
from sinkquant.recipe import Recipe


def require_distill(shape: ModelShape, recipe: Recipe) -> None:
    """Raises RequestError where `weights.distill` cannot be done on this model; protection changes nothing in that."""
    if not recipe.weights.distill:
        return
    choices = with_inputs(carried(base_choices(shape, recipe), shape, recipe), shape, recipe)
    prefix = recipe.kv_cache is not None and recipe.kv_cache.prefix != "none"
    require_tunable({name: choice.form for name, choice in choices.items() if choice.quantized}, shape,
                    prefix and recipe.activations.format != "16-bit")
