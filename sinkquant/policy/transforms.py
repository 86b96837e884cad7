"""Which transforms a recipe asks for, and whether a model computes the same after them."""

from __future__ import annotations

from sinkquant.artifacts import KVCachePlan, ModelShape, Transform
from sinkquant.errors import RequestError
from sinkquant.policy.rules import Choice
from sinkquant.recipe import Recipe


def choose_transforms(choices: dict[str, Choice], shape: ModelShape, recipe: Recipe,
                      kv_cache: KVCachePlan | None) -> list[Transform]:
    """The transforms of a plan with these formats, in the order in which they are carried out.

    Raises:
        RequestError: the model would not compute the same after one of them.
    """
    require_transforms(shape, recipe)
    transforms: list[Transform] = []
    if recipe.weights.rotate != "none":
        transforms.append(Transform(name="rotate", scope=recipe.weights.rotate))
    check_transforms(transforms, shape, kv_cache)
    return transforms


def require_transforms(shape: ModelShape, recipe: Recipe) -> None:
    """Refuse what a recipe asks for and this model does not allow, before anything is detected.

    Raises:
        RequestError: with the reason.
    """
    if recipe.weights.rotate == "none":
        return
    _check_rotation(recipe.weights.rotate, shape, None)
    if recipe.weights.rotate == "full" and recipe.gate.min_massive_overlap is not None:
        raise RequestError("gate.min_massive_overlap compares channels that weights.rotate=full spreads over all; "
                           "leave it out or set weights.rotate=values.")


def check_transforms(transforms: list[Transform], shape: ModelShape, kv_cache: KVCachePlan | None) -> None:
    """Refuse what this model, or the cache of its plan, does not allow.

    Raises:
        RequestError: with the reason.
    """
    for transform in transforms:
        if transform.name == "rotate":
            _check_rotation(str(transform.scope), shape, kv_cache)


def shape_after(transforms: list[Transform], shape: ModelShape) -> ModelShape:
    """The shape with the tensors that the transforms add."""
    if any(transform.scope == "full" for transform in transforms):
        return shape.model_copy(update={"tensors": shape.tensors | shape.untied})
    return shape


def _check_rotation(scope: str, shape: ModelShape, kv_cache: KVCachePlan | None) -> None:
    if scope in shape.not_rotated:
        other = "values" if "values" not in shape.not_rotated else "none"
        raise RequestError(f"weights.rotate={scope} is not possible in {shape.architecture}: "
                           f"{shape.not_rotated[scope]}; set weights.rotate={other}.")
    if scope == "full" and kv_cache is not None and kv_cache.massive is not None:
        raise RequestError("kv_cache.exact 'massive' looks for channels that weights.rotate=full spreads over all; use "
                           "kv_cache.exact=detected or weights.rotate=values.")
