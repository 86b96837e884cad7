"""Sensitivities + budget -> formats: the least predicted loss for the bytes, or the fewest bytes for the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sinkquant.artifacts import KVCachePlan, ModelShape, Sensitivity, SinkMap, Terms, UnitSensitivity
from sinkquant.artifacts.sizes import checkpoint_bytes, module_bytes
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED
from sinkquant.policy.ends import bits_of_ends, choose_ends, end_options, sized
from sinkquant.policy.engines import ANY, engine_loads, engine_takes
from sinkquant.policy.expected import expect_loss
from sinkquant.policy.explain import found_in, sentence
from sinkquant.policy.kv_budget import kv_bytes_of, kv_options, kv_units, solved_cache
from sinkquant.policy.rules import Draft
from sinkquant.policy.solvable import check_solvable
from sinkquant.policy.solver import ROUNDS, Option, Solution, fewest_bytes, least_loss
from sinkquant.recipe import Budget, Recipe
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.tensors import total_bytes

EXACT = WeightFormat(16, None)


@dataclass(frozen=True)
class Allocation:
    """What the solver chose.

    Attributes:
        choices: every linear, those that were not free included.
        gap: how far below what was found the optimum may lie, as a share of it.
        explained: the linears whose reason says what was weighed against what.
        kv_cache: the cache, with the bits that were chosen where the solver had a choice.
        recipe: as it was asked, with the bits of the head and the embedding that were chosen.
    """

    choices: dict[str, Draft]
    gap: float
    explained: frozenset[str]
    kv_cache: KVCachePlan | None
    recipe: Recipe


def solve(base: dict[str, Draft], shape: ModelShape, sink_map: SinkMap, recipe: Recipe,
          sensitivity: Sensitivity | None, kv_cache: KVCachePlan | None) -> Allocation:
    """Solve the recipe's budget exactly.

    Args:
        base: formats before anything is solved for. Pinned ones stay, and so do those that are kept for the sinks as
            the recipe says, and linears without sensitivities.

    Raises:
        RequestError: there are no sensitivities, or they are of another model or of weights that the recipe changes
            before it quantizes them; or the budget cannot be met, with the nearest that can.
    """
    check_solvable(recipe)
    if sensitivity is None:
        raise RequestError("a budget that is solved for needs sensitivities; make them with "
                           "sinkquant.find_sensitivity, or run quantize-model plan, which makes them itself.")
    reasons = found_in(shape, sink_map)
    free = Problem(shape, base, sensitivity, recipe, kv_cache)
    solved = free.solve()
    choices = dict(base)
    for unit, forms, option in zip(free.units, free.options, solved.chosen, strict=False):
        for name in unit.modules:
            choices[name] = replace(_by_best(_in_format(base[name], forms[option]), unit, forms[option]),
                                    reason=sentence(unit, forms[option], sensitivity, base[name].why if
                                                    forms[option].split else reasons.get(name, "")))
    made = free.with_ends(solved.chosen)
    explained = frozenset(name for unit in free.units for name in unit.modules)
    return Allocation(choices, solved.gap, explained, free.cache(solved.chosen), made)


def check_engine(choices: dict[str, Draft], shape: ModelShape, recipe: Recipe) -> None:
    """Refuse a plan that the budget's engine cannot load because of what the recipe fixes."""
    engine = recipe.budget.engine
    refused = [(name, choice.form) for name, choice in choices.items()
               if choice.quantized and not engine_loads(engine, choice.form, shape.linears[name])]
    refused += [(name, end.form) for name, end in choose_ends(shape, recipe, False).items()
                if not engine_takes(engine, end.form)]
    for name, form in refused:
        raise RequestError(f"budget.engine {engine} does not load {name} in {form.bits} bits, groups of "
                           f"{form.group_size}, with {form.inputs} inputs, which the recipe fixes; change that, or the "
                           "engine.")


def no_candidate(shape: ModelShape, engine: str) -> RequestError:
    """The refusal of a budget whose engine would leave every linear in 16 bits."""
    return RequestError(f"budget.engine {engine} loads no candidate format of {shape.architecture}; use another "
                        "engine, or add to sensitivity.bits and sensitivity.group_sizes.")


def way_out(budget: Budget) -> str:
    """What may make smaller candidates."""
    if budget.engine == ANY:
        return "name fewer bits in sensitivity.bits"
    return f"name another engine, or fewer bits in sensitivity.bits that {budget.engine} loads"


def _in_format(choice: Draft, form: WeightFormat) -> Draft:
    if form.packed and not form.split and choice.keep == "split":
        return replace(choice, bits=form.bits, group_size=form.group_size, keep=None, columns=(), scalars=())
    if form.packed:
        return replace(choice, bits=form.bits, group_size=form.group_size)
    return replace(choice, bits=16, group_size=None, method=UNTOUCHED, keep=None, columns=(), scalars=())


def _by_best(choice: Draft, unit: UnitSensitivity, form: WeightFormat) -> Draft:
    """The choice by the method that loses least in its format: methods differ in no byte."""
    loss = unit.loss(form)
    return choice if loss is None else replace(choice, method=loss.method)


class Problem:
    """The units that the solver may choose for, and what it may choose: linears, then keys and values of KV heads, then
    the head and the embedding together, where there is a choice."""

    def __init__(self, shape: ModelShape, base: dict[str, Draft], sensitivity: Sensitivity, recipe: Recipe,
                 kv_cache: KVCachePlan | None = None) -> None:
        self.shape, self.base, self.recipe, self.kv_cache = shape, base, recipe, kv_cache
        foreign = [name for unit in sensitivity.units for name in unit.modules if name not in shape.linears]
        if foreign:
            raise RequestError(f"the sensitivities are of another model: it has no {foreign[0]}; make them for this "
                               "one.")
        free = [unit for unit in sensitivity.units if not any(_fixed(base[name], unit) for name in unit.modules)]
        self.units = _experts_together(free, base, shape)
        if not self.units:
            raise RequestError("there is nothing to solve for: weights.overrides, weights.ignore or protect.modules "
                               "name every linear; leave some out or drop the budget.")
        self.options = [self._formats(unit) for unit in self.units]
        if all(forms == [EXACT] for forms in self.options):
            raise no_candidate(shape, recipe.budget.engine)
        chosen = {name for unit in self.units for name in unit.modules}
        self.fixed = {name: base[name].form for name in base if name not in chosen}
        self.fixed_loss = expect_loss({name: self.fixed.get(name, EXACT) for name in base}, sensitivity)
        self.table = [[Option(sum(module_bytes(shape, name, self._stored(name, form)) for name in unit.modules),
                              _loss(unit, form, recipe.sensitivity.score)) for form in forms]
                      for unit, forms in zip(self.units, self.options, strict=True)]
        self.kv = kv_units(kv_cache, sensitivity, recipe)
        self.kv_table = kv_options(self.kv, kv_cache, recipe.budget) if kv_cache is not None and self.kv else []
        self.ends = end_options(shape, recipe, recipe.budget.engine)
        self.end_table = [[self._end(one, sensitivity) for one in self.ends]] if recipe.sensitivity.end_bits else []

    def _end(self, recipe: Recipe, sensitivity: Sensitivity) -> Option:
        loss = sensitivity.end_loss(bits_of_ends(recipe))
        if loss is None:
            raise RequestError("the sensitivities hold no losses of the head and the embedding; make them anew with "
                               "sensitivity.end_bits.")
        return Option(total_bytes(sized(self.shape, recipe).tensors.values()), loss)

    def _formats(self, unit: UnitSensitivity) -> list[WeightFormat]:
        choice = self.base[unit.modules[0]].form
        tried = [loss.form for loss in unit.tried(choice) if not loss.form.split or (loss.columns, loss.scalars) == (
            choice.columns, choice.scalars)]
        loads = [form for form in dict.fromkeys(tried) if all(
            engine_loads(self.recipe.budget.engine, self._stored(name, form), self.shape.linears[name])
            for name in unit.modules)]
        return [*loads, EXACT]

    def _stored(self, name: str, form: WeightFormat) -> WeightFormat:
        return _in_format(self.base[name], form).form

    def cache(self, chosen: Sequence[int]) -> KVCachePlan | None:
        """The KV cache with these options, those of the linears first."""
        if self.kv_cache is None or not self.kv:
            return self.kv_cache
        return solved_cache(self.shape, self.kv_cache, {unit: unit.bits[option] for unit, option in zip(
            self.kv, chosen[len(self.units):len(self.units) + len(self.kv)], strict=True)})

    def with_ends(self, chosen: Sequence[int]) -> Recipe:
        """The recipe with these options of the head and the embedding, which are the last."""
        return self.ends[chosen[-1] if self.end_table else 0]

    @property
    def all_options(self) -> list[list[Option]]:
        """Of all units that a limit of bytes counts."""
        return self.table + self.kv_table + self.end_table

    def solve(self) -> Solution:
        """The best options for the recipe's budget.

        Raises:
            RequestError: there are none; with the nearest budget that has some.
        """
        budget = self.recipe.budget
        if budget.bits is not None:
            return self._bits(budget.bits)
        whole = budget.whole(self.shape.values)
        if whole is not None:
            return self._bytes(whole)
        assert budget.loss is not None
        found = fewest_bytes(self.table + self.end_table, budget.loss - self.fixed_loss.total)
        if found is None:
            raise RequestError(f"budget.loss {budget.loss:g} is not feasible: what the recipe fixes loses "
                               f"{_at_least(self.fixed_loss.total)} nats by itself; raise budget.loss to that, or free "
                               "modules of weights.overrides.")
        return found

    def _bits(self, bits: float) -> Solution:
        weights = self.shape.weights
        fixed = sum(module_bytes(self.shape, name, form) for name, form in self.fixed.items())
        found = least_loss(self.table, int(bits * weights / 8) - fixed)
        if found is None:
            least = fixed + sum(min(option.bytes for option in unit) for unit in self.table)
            raise RequestError(f"budget.bits {bits:g} is not feasible: the smallest candidates and what is fixed take "
                               f"{math.ceil(8000 * least / weights) / 1000:.3f} bits per weight; raise budget.bits to "
                               f"that, or {way_out(self.recipe.budget)}.")
        return found

    def _bytes(self, allowed: int) -> Solution:
        table = self.all_options
        fewest = [unit.index(min(unit, key=lambda option: option.bytes)) for unit in table]
        smallest, kv_bytes = self.checkpoint(fewest), self._cache_bytes(fewest)
        least = sum(min(option.bytes for option in unit) for unit in table)
        room = allowed - kv_bytes - (smallest - least)
        for _ in range(ROUNDS):
            found = least_loss(table, room)
            over = 0 if found is None else self.checkpoint(found.chosen) + self._cache_bytes(found.chosen) - allowed
            if found is not None and over <= 0:
                return found
            if found is None:
                break
            room = found.bytes - over  # the header is longer where more modules are packed
        cache = f" and {kv_bytes:,} of the KV cache" if kv_bytes else ""
        budget, values = self.recipe.budget, self.shape.values
        (key,) = budget.limits
        raise RequestError(f"budget.{key} {budget.in_words(allowed, values)} is not feasible: the smallest checkpoint "
                           f"has {smallest:,} bytes{cache}; raise budget.{key} to "
                           f"{budget.in_words(smallest + kv_bytes, values)}, or {way_out(budget)}.")

    def _cache_bytes(self, chosen: Sequence[int]) -> int:
        return kv_bytes_of(self.shape, self.recipe.budget, self.cache(chosen))

    def checkpoint(self, chosen: Sequence[int]) -> int:
        """Bytes of the checkpoint with these options."""
        packed = {name: form for name, form in self.formats(chosen).items() if form.packed}
        return checkpoint_bytes(sized(self.shape, self.with_ends(chosen)), packed)

    def formats(self, chosen: Sequence[int]) -> dict[str, WeightFormat]:
        """The format of every linear with these options."""
        formats = dict(self.fixed)
        for unit, forms, option in zip(self.units, self.options, chosen, strict=False):  # the cache's follow
            formats |= {name: self._stored(name, forms[option]) for name in unit.modules}
        return formats


def _fixed(choice: Draft, unit: UnitSensitivity) -> bool:
    """Whether the recipe has decided: by a pattern, or by keeping the linear for the sinks in a way that has bits and
    was not tried."""
    if choice.pinned or not choice.quantized or choice.keep == "module":
        return True
    form = choice.form
    return form.split and not any((loss.columns, loss.scalars) == (form.columns, form.scalars) for loss in unit.losses)


def _experts_together(units: list[UnitSensitivity], base: dict[str, Draft],
                      shape: ModelShape) -> list[UnitSensitivity]:
    """Experts share one format in the whole model (`artifacts/experts.py`), so that they are one unit; none where the
    recipe fixes that of some."""
    plain = [unit for unit in units if not shape.linears[unit.modules[0]].part_of]
    experts = [unit for unit in units if shape.linears[unit.modules[0]].part_of]
    free = {name for unit in experts for name in unit.modules}
    if any(linear.part_of and name not in free and base[name].quantized for name, linear in shape.linears.items()):
        return plain
    return [*plain, *([_added_up(experts)] if experts else [])]


def _added_up(units: list[UnitSensitivity]) -> UnitSensitivity:
    """Units that take one format, with the sums of their losses; formats that each of them was tried in."""
    def total(terms: list[Terms]) -> Terms:
        return Terms(**{field: sum(getattr(one, field) for one in terms) for field in Terms.model_fields})

    losses = []
    for first in units[0].losses:
        alike = [loss for unit in units if (loss := unit.loss(first.form, first.method)) is not None]
        if len(alike) == len(units):
            measured = [loss.measured for loss in alike if loss.measured is not None]
            losses.append(first.model_copy(update={
                "predicted": total([loss.predicted for loss in alike]),
                "measured": total(measured) if len(measured) == len(alike) else None,
                "diagonal": sum(loss.diagonal for loss in alike)}))
    return UnitSensitivity(modules=[name for unit in units for name in unit.modules],
                           placed=all(unit.placed for unit in units), losses=losses)


def _at_least(loss: float) -> str:
    """In three digits, rounded up, so that the number in a message is itself feasible."""
    shown = float(f"{loss:.3g}")
    return f"{shown if shown >= loss else shown + 10.0 ** (math.floor(math.log10(loss)) - 2):.3g}"


def _loss(unit: UnitSensitivity, form: WeightFormat, score: str) -> float:
    loss = unit.loss(form)
    if loss is None:  # 16 bits
        return 0.0
    return loss.diagonal if score == "diagonal" else loss.terms.total
