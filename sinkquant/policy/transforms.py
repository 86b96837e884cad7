"""Which transforms a recipe asks for, and whether a model computes the same after them."""

from __future__ import annotations

from dataclasses import replace

from sinkquant.artifacts import KVCachePlan, ModelShape, SinkMap, Transform
from sinkquant.errors import RequestError
from sinkquant.policy.rules import Draft, affected
from sinkquant.recipe import Recipe

ROTATED_MASSIVE = ("kv_cache.exact 'massive' looks for channels that weights.rotate=full spreads over all; use "
                   "kv_cache.exact=detected or weights.rotate=values.")


def choose_transforms(choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
                      kv_cache: KVCachePlan | None) -> list[Transform]:
    """The transforms of a plan with these formats, in the order in which they are carried out.

    Raises:
        RequestError: the model would not compute the same after one of them.
    """
    require_transforms(shape, recipe)
    transforms: list[Transform] = []
    if recipe.weights.rotate != "none":
        transforms.append(Transform(name="rotate", scope=recipe.weights.rotate))
    # A prefix comes from the unquantized model: values that it has to fit are left as they are.
    # So do scales of an FP8 cache, which are of the unquantized model's values.
    values = (kv_cache is None or not kv_cache.prefix) and recipe.kv_cache_scheme is None
    if recipe.weights.smooth != "none":
        strength = recipe.weights.smooth_strength if recipe.weights.smooth == "smoothquant" else None
        transforms.append(Transform(name=recipe.weights.smooth, strength=strength, values=values))
    if any(choice.keep == "scale" for choice in choices.values()):
        transforms.append(Transform(name="scale", values=values))
    check_transforms(transforms, shape, kv_cache)
    return transforms


def require_transforms(shape: ModelShape, recipe: Recipe) -> None:
    """Refuse what a recipe asks for and this model does not allow, before anything is detected."""
    if recipe.weights.smooth != "none":
        _check_scales(f"weights.smooth={recipe.weights.smooth}", shape)
    if recipe.weights.rotate == "none":
        return
    _check_rotation(recipe.weights.rotate, shape, None)
    if recipe.weights.rotate == "full" and recipe.gate.min_massive_overlap is not None:
        raise RequestError("gate.min_massive_overlap compares channels that weights.rotate=full spreads over all; "
                           "leave it out or set weights.rotate=values.")
    if recipe.weights.rotate == "full" and recipe.kv_cache is not None and recipe.kv_cache.exact == "massive":
        raise RequestError(ROTATED_MASSIVE)


def scale_sinks(choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> dict[str, Draft]:
    """With `protect.channels` "scale": let the sink columns of the linears that sinks dominate be scaled up, where the
    norm or the linear before can take it; all that read the same channels are scaled together."""
    chosen = dict(choices)
    if recipe.protect.channels != "scale":
        return chosen
    for name, why in affected(shape, sink_map):
        choice, columns = chosen[name], sink_map.modules[name].sink_columns
        if not choice.quantized or choice.keep or not columns:
            continue
        takes, obstacle = shape.linears[name].scaled_by, _obstacle(name, shape, recipe)
        if takes is None or obstacle is not None:
            obstacle = obstacle or "no norm or linear that is known stands before it to take a scale"
            chosen[name] = replace(choice, reason=f"{choice.bits} bits: left unprotected, since {obstacle}; {why}")
            continue
        together = [member for member, linear in shape.linears.items()
                    if (linear.scaled_by, linear.reads) == (takes, shape.linears[name].reads)]
        for member in together:
            if chosen[member].quantized and not chosen[member].keep:
                of = why if member == name else f"it reads what {name} reads"
                reason = f"{chosen[member].bits} bits, sink columns scaled up and {takes} down: {of}"
                chosen[member] = replace(chosen[member], keep="scale", columns=tuple(columns), reason=reason, why=of)
    return chosen


def _obstacle(name: str, shape: ModelShape, recipe: Recipe) -> str | None:
    """What is in the way of scaling the input of a linear."""
    reads = shape.linears[name].reads
    if recipe.weights.rotate == "full" and reads in ("stream", "values"):
        return "weights.rotate=full spreads its sink columns over all"
    if recipe.weights.rotate == "values" and reads == "values":
        return "weights.rotate=values spreads its sink columns over the head"
    if reads == "values" and recipe.kv_cache is not None and recipe.kv_cache.prefix != "none":
        return "the prefix of the KV cache is of values that are not scaled"
    return None


def check_transforms(transforms: list[Transform], shape: ModelShape, kv_cache: KVCachePlan | None) -> None:
    """Refuse what this model, or the cache of its plan, does not allow."""
    for transform in transforms:
        if transform.name == "rotate":
            _check_rotation(str(transform.scope), shape, kv_cache)
        else:
            _check_scales(transform.name, shape)
            if transform.values and kv_cache is not None and kv_cache.prefix:
                raise RequestError(f"the plan's transform {transform.name!r} scales values, which the prefix of its KV "
                                   "cache does not follow; set its 'values' to false.")


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
        raise RequestError(ROTATED_MASSIVE)


def _check_scales(what: str, shape: ModelShape) -> None:
    if not any(linear.scaled_by for linear in shape.linears.values()):
        raise RequestError(f"{what} is not possible in {shape.architecture}: no norm and no linear that is known "
                           "stands before what is quantized; leave it out.")
