"""What a checkpoint holds the token embedding and the output head in."""

from __future__ import annotations

import itertools

from sinkquant.artifacts import EndShape, ModelShape, Plan
from sinkquant.artifacts.ends import EndDecision, end_bytes, with_ends
from sinkquant.artifacts.kv_scheme import with_kv_scales
from sinkquant.errors import RequestError
from sinkquant.policy.engines import engine_takes
from sinkquant.policy.kv_scheme import make_kv_scheme
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND, WeightFormat
from sinkquant.schemes.inputs import NO_ROUNDING
from sinkquant.schemes.integers import IN_BYTES
from sinkquant.schemes.registry import of_backend
from sinkquant.schemes.tensors import tensor_bytes, total_bytes

PER_TOKEN = 8
"""Bits from which on one scale per row is enough: its rounding is far below that of anything in the blocks."""
WORTH = 0.25
"""Bits per weight of the blocks that are worth a word."""
OWN_FORMAT = ("sinkquant's own format holds the embedding and the head in 16 bits; set weights.lm_head=16 and "
              "weights.embeddings=16, or protect.channels to another value.")


def check_ends(recipe: Recipe) -> None:
    """Refuse what no model's checkpoint could hold."""
    weights = recipe.weights
    if (weights.lm_head, weights.embeddings) == (16, 16):
        return
    if recipe.backend != DEFAULT_BACKEND:
        others = any(scheme.ends != NO_ROUNDING for scheme in of_backend(recipe.backend))
        other = "; its files hold both as weights.ends says" if others else ""
        raise RequestError(f"weights.lm_head and weights.embeddings are for the backend {DEFAULT_BACKEND}, "
                           f"not for {recipe.backend}; leave them at 16{other}.")
    if weights.embeddings not in (max(IN_BYTES.bits), 16):
        raise RequestError(f"weights.embeddings is {weights.embeddings}, and transformers loads a token embedding of 8 "
                           "bits, a byte for every code, but none in packed words; set it to 8 or 16.")
    if weights.embeddings < 16 and recipe.kv_cache is not None and recipe.kv_cache.prefix != "none":
        raise RequestError("the keys and values of kv_cache.prefix come from the unquantized token embedding; set "
                           "weights.embeddings=16 or kv_cache.prefix=none.")


def choose_ends(shape: ModelShape, recipe: Recipe, untied: bool) -> dict[str, EndDecision]:
    """How the embedding and the head are stored, by module name; empty where both are left alone.

    Args:
        untied: a rotation gives a tied head weights of its own.

    Raises:
        RequestError: the model has not what is asked for, or its shape does not fit.
    """
    check_ends(recipe)
    weights = recipe.weights
    found: dict[str, EndDecision] = {}
    for kind, key, bits in (("embedding", "embeddings", weights.embeddings), ("head", "lm_head", weights.lm_head)):
        if bits == 16:
            continue
        name, end = _end(shape, kind, key)
        tied = None if untied else end.shared_with
        shared = tied if tied is not None and bits == weights.embeddings else None
        if kind == "embedding" or shared:
            form = WeightFormat(bits, -1, storage=IN_BYTES.storage)
        else:
            form = WeightFormat(bits, -1 if bits >= PER_TOKEN else _group(name, end, recipe))
        asked = "the budget is solved for" if recipe.budget.solved and recipe.sensitivity.end_bits else (
            f"weights.{key} asks")
        found[name] = EndDecision(
            bits=bits, group_size=form.group_size, storage=form.storage, shares=shared,  # type: ignore[arg-type]
            bytes=end_bytes(shape, name, form, shared), reason=_reason(f"{bits} bits as {asked}", tied, shared))
    if weights.embeddings < 16 and weights.lm_head == 16 and not untied:
        for name in (name for name, end in shape.ends.items() if end.shared_with):
            raise RequestError(f"{name} of {shape.architecture} is tied to the token embedding, so that 8 bits of one "
                               "and 16 of the other would take more than both in 16; set weights.lm_head too.")
    return found


def end_options(shape: ModelShape, recipe: Recipe, engine: str = "any") -> list[Recipe]:
    """The recipe with every pair of bits of the head and the embedding that a budget may choose; as it is where it
    tries none. 16 bits may always be chosen; what takes no fewer bytes than a pair of no fewer bits may not.

    Raises:
        RequestError: the checkpoint would be in sinkquant's own format.
    """
    tried = recipe.sensitivity.end_bits
    if not tried:
        return [recipe]
    if recipe.protect.channels == "split" or any(linear.transposed for linear in shape.linears.values()):
        raise RequestError("sensitivity.end_bits tries the head and the embedding in fewer bits, which sinkquant's own "
                           "format holds in 16; leave it out.")
    found: list[tuple[int, int, int, Recipe]] = []
    for head, embeddings in itertools.product(sorted({*tried, 16}, reverse=True), repeat=2):
        one = recipe.changed(weights={"lm_head": head, "embeddings": embeddings})
        try:
            ends = choose_ends(shape, one, False)
        except RequestError:  # no checkpoint holds that
            continue
        if not all(engine_takes(engine, end.form) for end in ends.values()):
            continue
        size = total_bytes(with_ends(shape, ends).tensors.values())
        if not any(size >= less and head <= more and embeddings <= wider for more, wider, less, _ in found):
            found.append((head, embeddings, size, one))
    return [one for _, _, _, one in found]


def better_spent(shape: ModelShape, recipe: Recipe) -> list[str]:
    """A note where a head and an embedding in 16 bits take what would make the blocks' weights more precise by a
    quarter of a bit or more; every whole bit there takes three quarters off the loss."""
    if (recipe.weights.lm_head, recipe.weights.embeddings) != (16, 16) or recipe.budget.limited:
        return []
    try:
        ends = choose_ends(shape, recipe.changed(weights={"lm_head": 8, "embeddings": 8}), False)
    except RequestError:  # no checkpoint of this recipe holds that
        return []
    whole, smaller = (total_bytes(one.tensors.values())
                      for one in (shape, with_ends(shape, ends)))
    freed = 8 * (whole - smaller) / shape.weights
    if freed < WORTH or any(linear.transposed for linear in shape.linears.values()):
        return []
    return [f"the token embedding and the output head in 8 bits (weights.embeddings=8, weights.lm_head=8) would free "
            f"{whole - smaller:,} bytes, {freed:.1f} bits for every weight of the blocks; the recipe w5-file-budget "
            "spends a size that you set (budget.megabytes) where it loses least; transformers loads that"]


def bits_of_ends(recipe: Recipe) -> dict[str, int]:
    """The bits of both, by kind."""
    return {"head": recipe.weights.lm_head, "embedding": recipe.weights.embeddings}


def sized(shape: ModelShape, recipe: Recipe) -> ModelShape:
    """The shape with the tensors that the recipe leaves of the embedding and the head and the scales of its KV cache,
    for a count of bytes."""
    untied = recipe.weights.rotate == "full" and bool(shape.untied)
    rotated = shape.model_copy(update={"tensors": shape.tensors | shape.untied}) if untied else shape
    return with_kv_scales(with_ends(rotated, choose_ends(shape, recipe, untied)), make_kv_scheme(shape, recipe))


def asked_of_edited(plan: Plan, recipe: Recipe, shape: ModelShape) -> Recipe:
    """The recipe of an edited plan with the bits that the plan gives to both ends.

    Raises:
        RequestError: the plan names another module.
    """
    foreign = sorted(set(plan.ends) - set(shape.ends))
    if foreign:
        raise RequestError(f"the plan stores {foreign[0]!r} as an embedding or a head, which this model does not have.")
    bits = {kind: next((plan.ends[name].bits for name in plan.ends if shape.ends[name].kind == kind), 16)
            for kind in ("head", "embedding")}
    return recipe.changed(weights={"lm_head": bits["head"], "embeddings": bits["embedding"]})


def check_counted(plan: Plan, counted: Plan) -> None:
    """Refuse an edited plan that stores an end as nothing here does."""
    for name, end in plan.ends.items():
        other = counted.ends[name]
        if (end.form, end.shares) != (other.form, other.shares):
            raise RequestError(f"the plan stores {name} as {end.storage} in groups of {end.group_size}; of the token "
                               f"embedding and the head edit the bits alone, here {other.storage} in groups of "
                               f"{other.group_size} follows from them.")


def end_notes(shape: ModelShape, ends: dict[str, EndDecision]) -> list[str]:
    """What a plan says of them, in bytes."""
    return [f"{name} takes {end.bytes:,} bytes: {end.reason}" + (
        f"; it took {_bytes(shape, name):,}" if f"{name}.weight" in shape.tensors else "")
        for name, end in ends.items()]


def _bytes(shape: ModelShape, name: str) -> int:
    return tensor_bytes(*shape.tensors[f"{name}.weight"])


def _end(shape: ModelShape, kind: str, key: str) -> tuple[str, EndShape]:
    for name, end in shape.ends.items():
        if end.kind == kind:
            return name, end
    what = "token embedding is none that looks rows up" if kind == "embedding" else "output head is no linear"
    raise RequestError(f"weights.{key} is asked for, and the {what} in {shape.architecture}; leave it at 16.")


def _group(name: str, end: EndShape, recipe: Recipe) -> int:
    size = recipe.weights.group_size
    if size != -1 and end.columns % size:
        raise RequestError(f"weights.group_size {size} does not divide the {end.columns} input columns of {name}; "
                           "choose one that does, or set weights.lm_head to 8 or 16.")
    return size


def _reason(words: str, tied: str | None, shared: str | None) -> str:
    if shared:
        return f"{words}, tied: the codes are those of {shared}"
    return f"{words}{f', no longer tied to {tied}, with which it shared its bytes' if tied else ''}"
