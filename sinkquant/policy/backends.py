"""What the files of every backend can hold of a plan. What they cannot is refused, or left in 16 bits with a reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from sinkquant.artifacts import LinearShape, ModelShape
from sinkquant.artifacts.formats import PLAIN, Storage, backend_of
from sinkquant.errors import RequestError
from sinkquant.policy.rules import Choice
from sinkquant.recipe import Recipe

COMMON_GROUPS = frozenset({-1, 32, 64, 128})


@dataclass(frozen=True)
class Carrier:
    """What one storage can hold.

    Attributes:
        bits: what a weight may take. mixed: whether linears of one checkpoint may differ in it.
        group_size: the recipe's, where the backend has its own; null where any will do.
        methods: of choosing the codes; a backend that rounds by itself only has "rtn".
        loads_in: who reads the files.
    """

    bits: tuple[int, ...]
    group_size: int | None
    methods: tuple[str, ...]
    loads_in: tuple[str, ...]
    mixed: bool = False


_BITSANDBYTES = ("transformers with bitsandbytes", "sinkquant")
_QUANTO = ("optimum.quanto", "sinkquant")
CARRIERS: dict[str, Carrier] = {
    **dict.fromkeys(("nf4", "nf4-double", "fp4", "fp4-double"), Carrier((4,), 64, ("rtn",), _BITSANDBYTES)),
    "llm.int8": Carrier((8,), -1, ("rtn",), _BITSANDBYTES),
    "quanto": Carrier((2, 4, 8), 128, ("rtn",), _QUANTO, mixed=True),
    "quanto-float8": Carrier((8,), -1, ("rtn",), _QUANTO),
    "gptq": Carrier((2, 3, 4, 8), None, ("rtn", "gptq", "gptaq"), ("gptqmodel", "sinkquant"))}


def storage_of(recipe: Recipe) -> Storage:
    """The storage that a recipe asks for.

    Raises:
        RequestError: its backend does not have that number format.
    """
    backend, kind, double = recipe.backend, recipe.weights.format, recipe.weights.double_quantization
    found: dict[tuple[str, str], Storage] = {
        ("compressed-tensors", "int"): PLAIN, ("bitsandbytes", "nf4"): "nf4", ("bitsandbytes", "fp4"): "fp4",
        ("bitsandbytes", "int"): "llm.int8", ("quanto", "int"): "quanto", ("quanto", "float8"): "quanto-float8",
        ("gptq", "int"): "gptq"}
    if (backend, kind) not in found:
        kinds = " or ".join(one for name, one in found if name == backend)
        raise RequestError(f"weights.format {kind!r} is not held by the backend {backend}; use {kinds}, or another "
                           "backend.")
    storage = found[backend, kind]
    if not double:
        return storage
    if storage not in ("nf4", "fp4"):
        raise RequestError("weights.double_quantization is for bitsandbytes' nf4 and fp4; set it to false.")
    return "nf4-double" if storage == "nf4" else "fp4-double"


def check_recipe(recipe: Recipe) -> None:
    """Refuse what the recipe's backend cannot hold.

    Raises:
        RequestError: naming the key, and what would do.
    """
    storage, weights, protect = storage_of(recipe), recipe.weights, recipe.protect
    if storage == PLAIN:
        return
    carrier, backend = CARRIERS[storage], recipe.backend
    methods = {weights.method, *(override.method for override in weights.overrides if override.method)}
    for method in sorted(methods - set(carrier.methods)):
        raise RequestError(f"{backend} rounds weights to nearest by itself, so that {method} cannot choose its codes; "
                           "set weights.method=rtn.")
    if weights.tune and carrier.methods == ("rtn",):
        raise RequestError(f"{backend} rounds weights by itself, so that they cannot be tuned; set weights.tune=0.")
    if storage == "quanto" and recipe.prune.method != "none" and min(
            weights.bits, *(override.bits for override in weights.overrides), 8) < 8:
        raise RequestError("quanto's 2 and 4 bits have no code for zero, so that pruned weights would come back; use 8 "
                           "bits, or the backend compressed-tensors.")
    if recipe.activations.format != "16-bit":
        raise RequestError(f"{backend} checkpoints cannot ask for inputs in {recipe.activations.format}; set "
                           "activations.format=16-bit, or use the backend compressed-tensors.")
    wanted = [("weights.bits", weights.bits)]
    wanted += [(f"weights.overrides[{i}].bits", override.bits) for i, override in enumerate(weights.overrides)]
    if protect.modules or protect.channels != "none":
        wanted.append(("protect.bits", protect.bits))
    for key, bits in wanted:
        held = carrier.bits if carrier.mixed or key == "weights.bits" else (weights.bits,)
        if bits not in held and (bits <= 8 or key == "weights.bits"):
            allowed = [*map(str, held), *([] if key == "weights.bits" else ["16"])]
            raise RequestError(f"{key} is {bits}, and {backend} holds {' or '.join(allowed)} bits in such a "
                               "checkpoint; change it, or use the backend compressed-tensors.")
    group = -1 if weights.bits == 8 and storage == "quanto" else carrier.group_size
    sizes = {weights.group_size, *(override.group_size for override in weights.overrides if override.group_size)}
    if storage == "gptq" and len(sizes) > 1:
        raise RequestError("gptq holds one group size in a checkpoint; leave the overrides' group_size out.")
    if group is not None and (weights.group_size != group if carrier.mixed else sizes != {group}):
        raise RequestError(f"{backend} groups the weights by itself; set weights.group_size={group}"
                           f"{' and leave that of the overrides out' if len(sizes) > 1 else ''}.")


def carried(choices: dict[str, Choice], shape: ModelShape, recipe: Recipe) -> dict[str, Choice]:
    """The choices in the storage of the recipe's backend; linears that it cannot hold stay in 16 bits.

    Raises:
        RequestError: nothing is left to quantize.
    """
    storage = storage_of(recipe)
    if storage == PLAIN:
        return choices
    made = {name: _carry(name, choice, shape, storage) if choice.quantized else choice
            for name, choice in choices.items()}
    if any(choice.quantized for choice in choices.values()) and not any(choice.quantized for choice in made.values()):
        why = next(made[name].reason for name, choice in choices.items() if choice.quantized)
        raise RequestError(f"{recipe.backend} can hold nothing of {shape.architecture}: every linear is {why}.")
    return made


def check_choices(choices: dict[str, Choice], shape: ModelShape) -> None:
    """Refuse edited choices that no backend's checkpoint can hold.

    Raises:
        RequestError: several backends in one plan, or a linear in a format that its storage does not have.
    """
    storages = {choice.storage for choice in choices.values() if choice.quantized}
    if storages in (set(), {PLAIN}):
        return
    formats = {choice.form for choice in choices.values() if choice.quantized}
    if len(storages) > 1 or (len(formats) > 1 and not CARRIERS[next(iter(storages))].mixed):
        raise RequestError(f"the plan holds linears in {len(formats)} formats of {', '.join(sorted(storages))}, which "
                           "one checkpoint cannot; give them one.")
    for name, choice in choices.items():
        if choice.quantized:
            fitting = _carry(name, choice, shape, choice.storage)
            if choice.bits not in CARRIERS[choice.storage].bits or fitting.form != choice.form:
                raise RequestError(f"the plan gives {name} {choice.bits} bits in groups of {choice.group_size}, which "
                                   f"{choice.storage} does not hold.")


def more_bits(choice: Choice, columns: int) -> Choice | None:
    """A choice of another backend with the next more precise format that it has, or None."""
    carrier = CARRIERS[choice.storage]
    higher = [bits for bits in carrier.bits if bits > choice.bits] if carrier.mixed else []
    if not higher:
        return None
    return replace(choice, bits=higher[0], group_size=_quanto_group(higher[0], columns))


def engines(choices: Collection[Choice]) -> list[str]:
    """Who loads a checkpoint of another backend."""
    packed = [choice for choice in choices if choice.quantized]
    found = list(CARRIERS[packed[0].storage].loads_in)
    if packed[0].storage == "gptq" and all(c.bits in (4, 8) and c.group_size in COMMON_GROUPS for c in packed):
        found.insert(1, "vllm")
    return found


def notes(choices: Collection[Choice], recipe: Recipe) -> list[str]:
    """What a plan for another backend leaves behind."""
    storages = {choice.storage for choice in choices if choice.quantized}
    if storages in (set(), {PLAIN}):
        return []
    backend = backend_of(set(storages))
    found = []
    if backend != "gptq":
        found.append(f"{backend} rounds the weights by itself: the statistics of sink tokens do not reach them, only "
                     "whole linears can be kept for the sinks")
    if "llm.int8" in storages:
        found.append("LLM.int8() rounds the inputs of its linears too, columns over 6 excepted")
    if backend == "quanto":
        found.append("optimum.quanto loads it (QuantizedModelForCausalLM), plain transformers refuses it")
    if backend == "gptq":
        found.append("loading it outside sinkquant takes the package gptqmodel, which was not run here")
    if recipe.kv_cache is not None:
        found.append(f"the packed KV cache is sinkquant's own: other loaders of a {backend} checkpoint keep theirs in "
                     "16 bits")
    return found


def _carry(name: str, choice: Choice, shape: ModelShape, storage: Storage) -> Choice:
    linear = shape.linears[name]
    obstacle = _obstacle(name, linear, shape, storage)
    if obstacle:
        return Choice(16, None, "none", f"left in 16 bits: {obstacle}", pinned=True)
    group = _quanto_group(choice.bits, linear.columns) if storage == "quanto" else choice.group_size
    return replace(choice, storage=storage, group_size=group)


def _obstacle(name: str, linear: LinearShape, shape: ModelShape, storage: Storage) -> str:
    if linear.part_of or f"{name}.weight" not in shape.tensors:  # an expert
        return f"{backend_of({storage})} packs nn.Linear only"
    if storage.startswith(("nf4", "fp4")) and linear.columns % 64:
        return f"bitsandbytes gives wrong values where 64 does not divide the {linear.columns} input columns"
    if storage == "gptq" and (linear.columns % 32 or linear.rows % 32):
        return f"gptq packs multiples of 32, and the weight is {linear.rows} x {linear.columns}"
    return ""


def _quanto_group(bits: int, columns: int) -> int:
    """The group that quanto picks: 128, or the largest of 96, 64 and 32 that divides; rows of 128 or less are one."""
    if bits == 8 or columns <= 128:
        return -1
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), -1)
