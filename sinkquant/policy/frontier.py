"""A sweep of budgets: the least predicted loss at every size, beside uniform plans and the control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sinkquant.artifacts import KVCachePlan, ModelShape, Sensitivity, SinkMap
from sinkquant.artifacts.frontier import Frontier, FrontierPoint
from sinkquant.artifacts.sizes import checkpoint_bytes, module_bytes
from sinkquant.policy.allocate import Problem
from sinkquant.policy.choices import choices_of
from sinkquant.policy.ends import asked_of_edited, bits_of_ends, sized
from sinkquant.policy.expected import expect_loss
from sinkquant.policy.kv_budget import expected_kv_loss, kv_bytes_of
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.policy.plan import make_control, make_plan
from sinkquant.policy.solvable import bits_tried, check_solvable
from sinkquant.policy.solver import efficient
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat

POINTS = 20


def make_frontier(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, sensitivity: Sensitivity,
                  points: int = POINTS) -> Frontier:
    """Solve `points` budgets from the smallest candidates to the largest, evenly spaced in bytes.

    Every one of them is a plan that no other beats: of the sizes at which the solution needs no branching
    (`solver.efficient`) the largest one below the budget. Where two budgets have the same, there is one point less.
    The recipe's own plan is drawn as well, and its control.

    Raises:
        RequestError: as `make_plan`.
    """
    check_solvable(recipe)
    plan = make_plan(shape, sink_map, recipe, sensitivity)
    control = make_control(shape, sink_map, recipe, plan, sensitivity)
    _, choices = choices_of(shape, sink_map, recipe)
    base = plan.kv_cache if recipe.solves_cache else make_kv_plan(shape, sink_map, recipe)
    problem = Problem(shape, choices, sensitivity, recipe, base)
    planned = asked_of_edited(plan, recipe, shape)

    def point(name: str, kind: str, formats: Mapping[str, WeightFormat], cache: KVCachePlan | None,
              ends: Recipe) -> tuple[FrontierPoint, set[str]]:
        """A point, and what its loss leaves out because it was not tried so."""
        expected = expect_loss(formats, sensitivity)
        packed = {module: form for module, form in formats.items() if form.packed}
        size = sum(module_bytes(shape, module, form) for module, form in formats.items())
        total = checkpoint_bytes(sized(shape, ends), packed)
        counted = recipe.budget.context is not None and cache is not None and bool(sensitivity.kv)
        of_cache = expected_kv_loss(cache, sensitivity) if counted else 0.0
        of_ends = sensitivity.end_loss(bits_of_ends(ends))
        unknown = {*expected.unknown, *(["the KV cache"] if of_cache is None else []),
                   *(["the head and the embedding"] if of_ends is None else [])}
        return FrontierPoint(name=name, kind=kind, bits_per_weight=8 * size / shape.weights,  # type: ignore[arg-type]
                             bytes=total + kv_bytes_of(shape, recipe.budget, cache),
                             kl=expected.total + (of_cache or 0.0) + (of_ends or 0.0), kl_sinks=expected.sinks), unknown

    solutions = efficient(problem.all_options)
    largest = sum(max(option.bytes for option, form in zip(unit, forms, strict=True) if form.packed or len(unit) == 1)
                  for unit, forms in zip(problem.table, problem.options, strict=True))
    largest += sum(unit[-2].bytes for unit in problem.kv_table)
    largest += sum(max(option.bytes for option in unit) for unit in problem.end_table)
    least = solutions[0].bytes
    budgets = [least + (largest - least) * step // max(points - 1, 1) for step in range(points)]
    picked = dict.fromkeys(max((s for s in solutions if s.bytes <= budget), key=lambda s: s.bytes)
                           for budget in budgets)
    found, left_out = [], set[str]()
    for solution in picked:
        one, left_out = point("", "solved", problem.formats(solution.chosen), problem.cache(solution.chosen),
                              problem.with_ends(solution.chosen))
        found.append(one.model_copy(update={"name": f"solved, {one.bits_per_weight:.2f} bits"}))
    beside = [point(f"all {bits} bits", "uniform", {
        name: replace(choice, bits=bits).form if choice.quantized and not choice.pinned else choice.form
        for name, choice in choices.items()}, base, planned) for bits in bits_tried(recipe)]
    beside.append(point("the recipe's plan", "asked", {name: d.form for name, d in plan.modules.items()}, plan.kv_cache,
                        planned))
    beside.append(point("its control", "control", {name: d.form for name, d in control.modules.items()},
                        control.kv_cache, planned))
    # A sum that leaves out something else than theirs cannot be compared with them.
    undrawn = {one.name: min(unknown ^ left_out) for one, unknown in beside if unknown != left_out}
    found += [one for one, unknown in beside if unknown == left_out]
    kv_bytes = kv_bytes_of(shape, recipe.budget, plan.kv_cache)
    notes = ["losses of the control and of uniform plans are those of their formats; that the control's statistics do "
             "not know the sinks is not in them"]
    if undrawn:
        notes.append(f"not drawn, since formats without sensitivities are others in them than in the solved plans: "
                     f"{', '.join(undrawn)}; among these formats that of {min(undrawn.values())}")
    if left_out:
        notes.append(f"no loss counts {len(left_out)} parts whose formats have no sensitivity, among them "
                     f"{min(left_out)}")
    if kv_bytes:
        notes.append(f"bytes count the KV cache at {recipe.budget.context:,} tokens x {recipe.budget.batch}, "
                     f"{kv_bytes:,} in the recipe's plan; losses count it where its heads have sensitivities")
    return Frontier(model=shape.name, recipe=recipe.name, kv_bytes=kv_bytes, points=found, notes=notes)
