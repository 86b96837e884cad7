"""Which formats a linear is tried in, and the rounding error of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sinkquant.artifacts.plan import CALIBRATED, Method
from sinkquant.artifacts.sizes import expert_scale_dtype, scale_dtype
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.rtn import RTN
from sinkquant.recipe import Recipe


@dataclass(frozen=True)
class Candidate:
    """One format that a unit is tried in."""

    bits: int
    group_size: int
    method: Method


@dataclass(frozen=True)
class Unit:
    """Linears that must share a format, and the formats that they are tried in. `owner`: the module whose experts they
    are, null for linears of their own."""

    modules: tuple[str, ...]
    block: int
    candidates: tuple[Candidate, ...]
    owner: str | None = None


def units_of(decoder: Decoder, recipe: Recipe) -> list[Unit]:
    """Every linear that may be quantized, with those that engines fuse it with, in the order of the model; all experts
    of a layer are one unit.

    Raises:
        RequestError: no group size divides the columns of some linear.
    """
    sizes = list(dict.fromkeys(recipe.sensitivity.group_sizes or [recipe.weights.group_size]))
    shape = decoder.shape("")
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
        candidates = tuple(Candidate(bits, size, recipe.weights.method)
                           for bits in sorted(set(recipe.sensitivity.bits)) for size in fitting)
        found.append(Unit(members, shape.linears[members[0]].block, candidates, owner))
    order = {name: place for place, name in enumerate(shape.linears)}
    return sorted(found, key=lambda unit: (unit.block, order[unit.modules[0]]))


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
        if one.method in CALIBRATED:
            packed = GPTQ(one.bits, one.group_size, settings.damping, settings.act_order, scales,
                          settings.scale_search, passes=0).quantize(weight, hessian, name)
        else:
            packed = RTN(one.bits, one.group_size, scales, settings.scale_search).quantize(weight)
        yield one, packed.dequantized(stored).float() - weight.float()
