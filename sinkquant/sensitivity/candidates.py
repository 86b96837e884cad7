"""Which formats a linear is tried in, and the rounding error of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.artifacts.plan import CALIBRATED, Method
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy.plan import choices_of
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.packed import PackedWeight
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.split import Solve, Split
from sinkquant.recipe import Recipe
from sinkquant.schemes.tensors import expert_scale_dtype, scale_dtype


@dataclass(frozen=True)
class Candidate:
    """One format that a unit is tried in. `columns` and `scalars` stand beside the codes, as in `ModuleDecision`."""

    bits: int
    group_size: int
    method: Method
    columns: tuple[int, ...] = ()
    scalars: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Unit:
    """Linears that must share a format, and the formats that they are tried in. `owner`: the module whose experts they
    are, null for linears of their own."""

    modules: tuple[str, ...]
    block: int
    candidates: tuple[Candidate, ...]
    owner: str | None = None


def units_of(decoder: Decoder, recipe: Recipe, sink_map: SinkMap) -> list[Unit]:
    """Every linear that may be quantized, with those that engines fuse it with, in the order of the model; all experts
    of a layer are one unit. With `protect.channels` "split" what it would split is tried both ways.

    Raises:
        RequestError: no group size divides the columns of some linear.
    """
    sizes = list(dict.fromkeys(recipe.sensitivity.group_sizes or [recipe.weights.group_size]))
    methods = tuple(dict.fromkeys([*recipe.sensitivity.methods])) or (recipe.weights.method,)
    shape = decoder.shape("")
    beside = _beside(shape, recipe, sink_map)
    layers: dict[str, list[str]] = {}
    for name, part in decoder.experts.items():
        layers.setdefault(part.owner, []).append(name)
    groups: list[tuple[tuple[str, ...], str | None]] = [(tuple(names), owner) for owner, names in layers.items()]
    for name, linear in shape.linears.items():
        if linear.part_of or linear.fixed:
            continue
        members = tuple(member for member in linear.fused_with or [name] if not shape.linears[member].fixed)
        if members[0] == name:
            groups.append((members, None))
    found = []
    for members, owner in groups:
        columns = {shape.linears[member].columns for member in members}
        fitting = [size for size in sizes if size == -1 or not any(one % size for one in columns)]
        if not fitting:
            raise RequestError(f"no group size of {sizes} divides the {max(columns)} input columns of {members[0]}; "
                               "change weights.group_size or sensitivity.group_sizes.")
        candidates = tuple(Candidate(bits, size, method, *kept)
                           for bits in sorted(set(recipe.sensitivity.bits)) for size in fitting
                           for method in methods
                           for kept in dict.fromkeys([((), ()), beside.get(members[0], ((), ()))]))
        found.append(Unit(members, shape.linears[members[0]].block, candidates, owner))
    order = {name: place for place, name in enumerate(shape.linears)}
    return sorted(found, key=lambda unit: (unit.block, order[unit.modules[0]]))


def _beside(shape: ModelShape, recipe: Recipe,
            sink_map: SinkMap) -> dict[str, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Module -> columns and single weights that the recipe would let stand beside its codes."""
    if recipe.protect.channels != "split":
        return {}
    _, choices = choices_of(shape, sink_map, recipe)
    return {name: (choice.columns, choice.scalars) for name, choice in choices.items() if choice.keep == "split"}


def errors(decoder: Decoder, name: str, hessian: torch.Tensor, candidates: tuple[Candidate, ...],
           recipe: Recipe, stored: torch.dtype) -> Iterator[tuple[Candidate, torch.Tensor]]:
    """(candidate, quantized weight - weight) of a linear one after the other, float32 [rows, columns].

    GPTAQ is tried as GPTQ, and coordinate descent is left out: both change little of what a format costs, and the
    candidates are many. Rounding to nearest takes no statistics, as in a plan without a calibrated method.

    Args:
        hessian: [columns, columns] of the input. stored: the dtype of the model, whatever it computes in.
    """
    settings, weight = recipe.weights, decoder.weight(name)
    kind = expert_scale_dtype if name in decoder.experts else scale_dtype
    scales = getattr(torch, kind(str(stored).removeprefix("torch.")))
    for one in candidates:
        solve = _method(one, recipe, scales, name)
        if one.columns or one.scalars:
            split = Split(one.columns, one.scalars, scales, one.method in CALIBRATED, settings.damping)
            packed = split.quantize(weight, hessian, solve, name=name)
        else:
            packed = solve(weight, hessian, None)
        yield one, packed.dequantized(stored).float() - weight.float()


def _method(one: Candidate, recipe: Recipe, scales: torch.dtype, name: str) -> Solve:
    """The candidate's method as a function of weight, Hessian and cross, which is not used."""
    settings = recipe.weights
    if one.method in CALIBRATED:
        gptq = GPTQ(one.bits, one.group_size, settings.damping, settings.act_order, scales, settings.scale_search,
                    passes=0)

        def solve(weight: torch.Tensor, hessian: torch.Tensor | None, _: torch.Tensor | None) -> PackedWeight:
            assert hessian is not None
            return gptq.quantize(weight, hessian, name)

        return solve
    nearest = RTN(one.bits, one.group_size, scales, settings.scale_search)
    return lambda weight, _, __: nearest.quantize(weight)
