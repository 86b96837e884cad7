"""What a budget can be solved for, told by the recipe alone."""

from __future__ import annotations

from sinkquant.errors import RequestError
from sinkquant.policy.carried import scheme_for
from sinkquant.recipe import Recipe
from sinkquant.schemes.registry import multiplied_with


def check_solvable(recipe: Recipe) -> None:
    """Refuse a budget that is solved for where sensitivities say nothing about what the recipe does.

    Raises:
        RequestError: weights that are changed before they are quantized, FP8, or another backend.
    """
    weights = recipe.weights
    for key, value in (("rotate", weights.rotate), ("smooth", weights.smooth)):
        if value != "none":
            raise RequestError(f"weights.{key}={value} changes the weights that sensitivities are taken of; set it to "
                               "none, or budget.solver=even.")
    scheme = scheme_for(recipe)
    multiplied = scheme if scheme.foreign else multiplied_with(scheme, recipe.activations.format)
    if not (multiplied.integers or scheme.foreign):
        raise RequestError(f"{multiplied.words} have one format, so that there is nothing to solve for; leave the "
                           "budget out.")
    if scheme.foreign:
        raise RequestError(f"a budget is solved for in the formats of compressed-tensors, not of {recipe.backend}; "
                           "leave backend at compressed-tensors, or set budget.solver=even.")
