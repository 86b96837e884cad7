"""What the files of a recipe's backend can hold of a plan. What they cannot is refused, or left in 16 bits with a
reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sinkquant.artifacts import ModelShape
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED
from sinkquant.policy.ends import check_ends
from sinkquant.policy.kv_scheme import check_kv_scheme
from sinkquant.policy.rules import Draft
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND, Scheme, scheme_of
from sinkquant.schemes.registry import all_schemes, of_backend


def scheme_for(recipe: Recipe) -> Scheme:
    """The number format that a recipe asks for, whatever inputs are rounded to.

    Raises:
        RequestError: its backend does not have that number format.
    """
    backend, weights = recipe.backend, recipe.weights
    held = of_backend(backend)
    found = [scheme for scheme in held if scheme.format == weights.format]
    if not found:
        kinds = " or ".join(dict.fromkeys(scheme.format for scheme in held if scheme.format))
        raise RequestError(f"weights.format {weights.format!r} is not held by the backend {backend}; use {kinds}, or "
                           "another backend.")
    found = [scheme for scheme in found if scheme.double_quantization == weights.double_quantization]
    if not found:
        raise RequestError("weights.double_quantization is for bitsandbytes' nf4 and fp4; set it to false.")
    found = [scheme for scheme in found if scheme.symmetric == weights.symmetric]
    if not found:
        others = dict.fromkeys(one.backend for one in all_schemes() if not one.symmetric)
        why = "" if held[0].foreign else (
            ": plain transformers loads no zero points in compressed-tensors' packed words")
        raise RequestError(f"weights.symmetric=false is not held by the backend {backend}{why}; set it to true, or the "
                           f"backend to {' or '.join(others)}.")
    found = [scheme for scheme in found if scheme.ends == weights.ends]
    if not found:
        kinds = " or ".join(dict.fromkeys(scheme.ends for scheme in held))
        raise RequestError(f"weights.ends {weights.ends!r} is not held by the backend {backend}; use {kinds}, or "
                           "another backend.")
    return found[0]


def check_recipe(recipe: Recipe) -> None:
    """Refuse what the recipe's backend cannot hold."""
    scheme, weights, protect, backend = scheme_for(recipe), recipe.weights, recipe.protect, recipe.backend
    check_ends(recipe)
    check_kv_scheme(recipe)
    if not scheme.foreign:
        _check_own(recipe, scheme)
        return
    for method in _unheld(recipe, scheme):
        raise RequestError(f"{backend} rounds weights to nearest by itself, so that {method} cannot choose its codes; "
                           "set weights.method=rtn.")
    if (weights.tune or weights.distill) and scheme.rounds_itself:
        raise RequestError(f"{backend} rounds weights by itself, so that they cannot be tuned; set weights.tune=0 and "
                           "weights.distill=0.")
    if (weights.tune or weights.distill) and not scheme.tunable:
        raise RequestError(f"{scheme.words} are not tuned; set weights.tune=0 and weights.distill=0.")
    tried = set(recipe.sensitivity.bits) & set(scheme.bits) if recipe.budget.solved else ()
    fewest = min(weights.bits, *(override.bits for override in weights.overrides), *tried, scheme.zero_from)
    if recipe.prune.zeros and fewest < scheme.zero_from:
        without = " and ".join(str(bits) for bits in scheme.bits if bits < scheme.zero_from)
        also = " (in sensitivity.bits too)" if tried else ""
        raise RequestError(f"{scheme.words} of {without} bits have no code for zero, so that pruned weights would come "
                           f"back; use {scheme.zero_from} bits{also}, or the backend {DEFAULT_BACKEND}.")
    if recipe.activations.format not in scheme.inputs:
        raise RequestError(f"{backend} checkpoints cannot ask for inputs in {recipe.activations.format}; set "
                           f"activations.format=16-bit, or use the backend {DEFAULT_BACKEND}.")
    _check_bits(recipe, scheme, protect.bits if protect.modules or protect.channels == "module" else None)
    _check_groups(recipe, scheme)


def _unheld(recipe: Recipe, scheme: Scheme) -> list[str]:
    """Methods that the recipe asks for and that do not choose the codes of a number format."""
    return [] if scheme.methods is None else sorted(recipe.methods - set(scheme.methods))


def _check_own(recipe: Recipe, scheme: Scheme) -> None:
    """Formats of compressed-tensors that are less free than its integers: those in blocks."""
    weights, protect, words = recipe.weights, recipe.protect, scheme.words
    held = list(dict.fromkeys(inputs for one in of_backend(scheme.backend) if one.format == scheme.format
                              for inputs in one.inputs))
    if recipe.activations.format not in held:
        raise RequestError(f"{words} are multiplied with inputs in {' or '.join(held)}, not in "
                           f"{recipe.activations.format}; set activations.format={held[0]}, or the weights.format that "
                           "goes with the inputs.")
    if scheme.integers:
        return
    for method in _unheld(recipe, scheme):
        raise RequestError(f"{method} does not choose the codes of {words}; set weights.method="
                           f"{' or '.join(scheme.methods or ())}.")
    raised = protect.bits if protect.modules or protect.channels == "module" else 16
    for key, bits in (("weights.bits", weights.bits), ("protect.bits", raised), *(
            (f"weights.overrides[{i}].bits", override.bits) for i, override in enumerate(weights.overrides))):
        if bits not in scheme.bits and (bits != 16 or key == "weights.bits"):
            raise RequestError(f"{key} is {bits}, and {words} have {' or '.join(map(str, scheme.bits))} bits"
                               f"{'' if key == 'weights.bits' else ', or stay in 16'}; change it.")
    for key, size in (("weights.group_size", weights.group_size), *(
            (f"weights.overrides[{i}].group_size", one.group_size) for i, one in enumerate(weights.overrides))):
        if size not in (scheme.group_size, None):
            raise RequestError(f"{key} is {size}, and {words} have blocks of {scheme.group_size}; set it to that.")
    if weights.tune and not scheme.tunable:
        raise RequestError(f"{words} are not tuned; set weights.tune=0.")
    if protect.channels == "split":
        raise RequestError(f"nothing stands beside {words}; set protect.channels to another value.")


def _check_bits(recipe: Recipe, scheme: Scheme, protected: int | None) -> None:
    weights = recipe.weights
    wanted = [("weights.bits", weights.bits)]
    wanted += [(f"weights.overrides[{i}].bits", override.bits) for i, override in enumerate(weights.overrides)]
    wanted += [("protect.bits", protected)] if protected is not None else []
    for key, bits in wanted:
        held = scheme.bits if scheme.mixed or key == "weights.bits" else (weights.bits,)
        if bits not in held and (bits <= 8 or key == "weights.bits"):
            allowed = [*map(str, held), *([] if key == "weights.bits" else ["16"])]
            raise RequestError(f"{key} is {bits}, and {recipe.backend} holds {' or '.join(allowed)} bits in such a "
                               f"checkpoint; change it, or use the backend {DEFAULT_BACKEND}.")


def _check_groups(recipe: Recipe, scheme: Scheme) -> None:
    weights, group = recipe.weights, scheme.group_for(recipe.weights.bits)
    sizes = {weights.group_size, *(override.group_size for override in weights.overrides if override.group_size)}
    if scheme.one_group_size and len(sizes) > 1:
        raise RequestError(f"{recipe.backend} holds one group size in a checkpoint; leave the overrides' group_size "
                           "out.")
    if group is not None and (weights.group_size != group if scheme.mixed else sizes != {group}):
        raise RequestError(f"{recipe.backend} groups the weights by itself; set weights.group_size={group}"
                           f"{' and leave that of the overrides out' if len(sizes) > 1 else ''}.")


def carried(choices: dict[str, Draft], shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """The choices in the storage of the recipe's backend; linears that it cannot hold stay in 16 bits.

    Raises:
        RequestError: nothing is left to quantize.
    """
    scheme = scheme_for(recipe)
    _check_dtype(scheme, shape)
    packed = {name: shape.linears[name].columns for name, choice in choices.items() if choice.quantized}
    if packed:
        scheme.check_model(shape.architecture, shape.folder, packed)
    for name in packed:
        if why := scheme.refuses(name, choices[name].bits, choices[name].group_size, choices[name].method):
            raise RequestError(why)
    made = {name: _carry(name, choice, shape, scheme) if choice.quantized else choice
            for name, choice in choices.items()}
    if any(choice.quantized for choice in choices.values()) and not any(choice.quantized for choice in made.values()):
        why = next(made[name].reason for name, choice in choices.items() if choice.quantized)
        raise RequestError(f"{recipe.backend} can hold nothing of {shape.architecture}: every linear is {why}.")
    return made


def check_choices(choices: dict[str, Draft], shape: ModelShape) -> None:
    """Refuse edited choices that no checkpoint can hold.

    Raises:
        RequestError: several backends in one plan, or a linear in a format that its storage does not have.
    """
    schemes = {scheme_of(choice.form) for choice in choices.values() if choice.quantized}
    formats = {choice.form for choice in choices.values() if choice.quantized}
    several = len({scheme.backend for scheme in schemes}) > 1
    if several or (len(formats) > 1 and not all(scheme.mixed for scheme in schemes)):
        storages = ", ".join(sorted({scheme.storage for scheme in schemes}))
        raise RequestError(f"the plan holds linears in {len(formats)} formats of {storages}, which one checkpoint "
                           "cannot; give them one.")
    for scheme in schemes:
        _check_dtype(scheme, shape)
    for name, choice in choices.items():
        if choice.quantized:
            scheme = scheme_of(choice.form)
            fitting = _carry(name, choice, shape, scheme)
            if choice.bits not in scheme.bits or fitting.form != choice.form:
                raise RequestError(f"the plan gives {name} {choice.bits} bits in groups of {choice.group_size}, which "
                                   f"{choice.storage} does not hold.")


def more_precise(choice: Draft, columns: int) -> Draft | None:
    """The choice with the next more precise format that may stand in the same checkpoint, or None."""
    form = scheme_of(choice.form).more_precise(choice.form, columns)
    return None if form is None else replace(choice, bits=form.bits, group_size=form.group_size)


def notes(choices: Collection[Draft], recipe: Recipe) -> list[str]:
    """What a plan leaves behind, or has to say, because of the number formats that it is in."""
    schemes = list(dict.fromkeys(scheme_of(choice.form) for choice in choices if choice.quantized))
    found = []
    for scheme in schemes:
        if scheme.rounds_itself:
            found.append(f"{scheme.backend} rounds the weights by itself: the statistics of sink tokens do not reach "
                         "them, only whole linears can be kept for the sinks")
        found += scheme.notes
        if scheme.foreign and recipe.kv_cache is not None:
            found.append(f"the packed KV cache is sinkquant's own: other loaders of a {scheme.backend} checkpoint keep "
                         "theirs in 16 bits")
    return list(dict.fromkeys(found))


def _check_dtype(scheme: Scheme, shape: ModelShape) -> None:
    """Raises RequestError where plain transformers could not run the checkpoint."""
    if scheme.dtypes is not None and shape.dtype not in scheme.dtypes:
        wanted = " or ".join(scheme.dtypes)
        raise RequestError(f"transformers runs {scheme.words} in models of {wanted} alone, and the tensors of this one "
                           f"are {shape.dtype}; save it in {wanted} first "
                           f"(from_pretrained(..., dtype='{wanted}'), then save_pretrained).")


def _carry(name: str, choice: Draft, shape: ModelShape, scheme: Scheme) -> Draft:
    linear = shape.linears[name]
    own_parameter = not linear.part_of and f"{name}.weight" in shape.tensors
    obstacle = scheme.obstacle(linear.rows, linear.columns, own_parameter)
    if obstacle:
        return Draft(16, None, UNTOUCHED, f"left in 16 bits: {obstacle}", pinned=True)
    group = scheme.fitted(choice.bits, choice.group_size, linear.columns)
    kind = choice.kind if choice.storage == scheme.storage else scheme.kind
    return replace(choice, storage=scheme.storage, kind=kind, group_size=group)
