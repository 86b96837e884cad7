"""Which formats a linear is tried in, and the rounding error of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.methods import Problem, method_named
from sinkquant.models import Decoder
from sinkquant.policy.choices import choices_of
from sinkquant.policy.solvable import bits_tried, groups_tried, tried_in
from sinkquant.quantize.split import solve_beside
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.weight_format import PLAIN


@dataclass(frozen=True)
class TrialFormat:
    """One format that a unit is tried in. `columns` and `scalars` stand beside the codes, as in `ModuleDecision`."""

    bits: int
    group_size: int
    method: str
    columns: tuple[int, ...] = ()
    scalars: tuple[tuple[int, int], ...] = ()
    storage: str = PLAIN

    @property
    def form(self) -> WeightFormat:
        """Of the codes."""
        return WeightFormat(self.bits, self.group_size, storage=self.storage)


@dataclass(frozen=True)
class Unit:
    """Linears that must share a format, and the formats that they are tried in. `owner`: the module whose experts they
    are, null for linears of their own."""

    modules: tuple[str, ...]
    block: int
    candidates: tuple[TrialFormat, ...]
    owner: str | None = None

    @property
    def by_input(self) -> list[tuple[str, ...]]:
        """The linears that read one input: all that engines fuse, and every expert by itself."""
        return [(name,) for name in self.modules] if self.owner else [self.modules]


def units_of(decoder: Decoder, recipe: Recipe, sink_map: SinkMap) -> list[Unit]:
    """Every linear that may be quantized, with those that engines fuse it with, in the order of the model; all experts
    of a layer are one unit. With `protect.channels` "split" what it would split is tried both ways.

    Raises:
        RequestError: no group size divides the columns of some linear.
    """
    methods = tuple(dict.fromkeys([*recipe.sensitivity.methods])) or (recipe.weights.method,)
    shape = decoder.shape("")
    beside, storage = _beside(shape, recipe, sink_map), tried_in(recipe).storage
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
        candidates = tuple(TrialFormat(bits, size, method, *kept, storage=storage)
                           for bits in bits_tried(recipe) for size in groups_tried(recipe, columns, members[0])
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


def errors(decoder: Decoder, names: Sequence[str], hessian: torch.Tensor, candidates: tuple[TrialFormat, ...],
           recipe: Recipe, stored: torch.dtype) -> Iterator[tuple[TrialFormat, dict[str, torch.Tensor]]]:
    """(candidate, linear -> quantized weight - weight) one after the other, float32 [rows, columns], of linears that
    read one input.

    GPTAQ is tried as GPTQ, and coordinate descent is left out: both change little of what a format costs, and the
    candidates are many. Rounding to nearest takes no statistics, as in a plan without a calibrated method.

    Args:
        hessian: [columns, columns] of the input. stored: the dtype of the model, whatever it computes in.
    """
    settings, factored = recipe.weights.model_copy(update={"descent": 0}), dict[Any, Any]()
    weights = {name: decoder.weight(name) for name in names}
    for one in candidates:
        method, form = method_named(one.method), one.form
        problems = [Problem(name, form, weight, getattr(torch, scheme_of(form).scales(
            str(stored).removeprefix("torch."), name in decoder.experts)), settings,
            hessian if method.needs_hessian else None, factored=factored) for name, weight in weights.items()]
        if one.columns or one.scalars:
            packed = [solve_beside(method, problem, one.columns, one.scalars) for problem in problems]
        else:
            packed = method.solve_together(problems)
        yield one, {name: made.dequantized(stored).float() - weight.float()
                    for (name, weight), made in zip(weights.items(), packed, strict=True)}
