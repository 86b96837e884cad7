"""SinkMap + Recipe -> Plan, and the plan of its control: a sink-unaware twin of the same size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sinkquant.artifacts import ModelShape, ModuleDecision, Plan, Sensitivity, SinkMap, Transform, WeighedSink
from sinkquant.artifacts.distill import check_distill
from sinkquant.artifacts.ends import with_ends
from sinkquant.artifacts.experts import TUNE_AND_EXPERTS, require_loadable
from sinkquant.artifacts.kv_scheme import with_kv_scales
from sinkquant.artifacts.plan import Statistics
from sinkquant.artifacts.sizes import checkpoint_bytes, own_format
from sinkquant.errors import RequestError
from sinkquant.methods import require_methods
from sinkquant.policy.activations import EXCLUDED, check_exclusion, simulated_notes, spare_sinks
from sinkquant.policy.allocate import Allocation, check_engine, solve
from sinkquant.policy.budget import choice_bytes, close_gap, evenly_spread, fill, linear_bytes
from sinkquant.policy.calibration import calibration, sink_selectors
from sinkquant.policy.carried import notes, scheme_for
from sinkquant.policy.choices import choices_of, unprotected
from sinkquant.policy.ends import OWN_FORMAT, asked_of_edited, choose_ends, end_notes
from sinkquant.policy.engines import loads_in, require_engine
from sinkquant.policy.expected import with_expected_loss
from sinkquant.policy.explain import explained
from sinkquant.policy.heads import with_silenced_heads, with_small_heads
from sinkquant.policy.input_bits import average_bits, with_input_bits
from sinkquant.policy.kv_budget import spent_by_loss
from sinkquant.policy.kv_cache import make_kv_control, make_kv_plan
from sinkquant.policy.kv_scheme import OWN_FORMAT as NO_KV_SCHEME
from sinkquant.policy.kv_scheme import make_kv_scheme
from sinkquant.policy.pruning import prune_like, with_pruning
from sinkquant.policy.rules import Draft, check_group_sizes
from sinkquant.policy.solvable import bits_tried
from sinkquant.policy.split import NO_BACKEND, NO_EXPERTS, NO_INPUTS
from sinkquant.policy.transforms import choose_transforms, shape_after
from sinkquant.policy.within import within_budget
from sinkquant.recipe import Recipe
from sinkquant.schemes import scheme_of

EVEN_TOLERANCE = 0.002
"""Share of the linears' bytes that an even spread may leave unspent before the control is made less even."""
MUCH = 0.005
"""Share of its plan's bytes that a control may take more before it is made smaller."""
NEEDS_PREFIX = ("'exclude' needs a prefix whose keys and values stay those of the unquantized model: set "
                "kv_cache.prefix=bos, or use 'boost'.")
INPUT_BITS, SIZE_DIFFERS = "inputs have", "the control's size differs by"
"""What notes of figures begin with."""


def make_plan(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, sensitivity: Sensitivity | None = None) -> Plan:
    """Decide on every linear, with a reason in words. Costs no quantization.

    Args:
        sensitivity: what formats cost; a budget that is solved for needs it, and any plan then predicts its loss.

    Raises:
        RequestError: the sink map is of another model, a pattern matches nothing, a group size does not fit, nothing
            can be quantized, the budget cannot be met, or it is to be solved for and there are no sensitivities; or
            the recipe's engine does not run the plan.
    """
    if recipe.prune.blocks is not None:
        raise RequestError("prune.blocks is carried out by a run, which plans for the shorter model; for a model in "
                           "memory drop its blocks by choose_blocks and drop_blocks, and leave prune.blocks out then.")
    base, choices = choices_of(shape, sink_map, recipe)
    kv_cache = make_kv_plan(shape, sink_map, recipe)
    if kv_cache is not None and recipe.solves_cache:  # before the budget, which may count its bytes
        kv_cache = spent_by_loss(shape, kv_cache, sensitivity, recipe)
    solved: Allocation | None = None
    if recipe.budget.solved:
        solved = solve(choices, shape, sink_map, recipe, sensitivity, kv_cache)
        choices, kv_cache, recipe = solved.choices, solved.kv_cache, solved.recipe
    elif recipe.budget.limited:
        choices = within_budget(base, choices, shape, sink_map, recipe)
    choices = with_input_bits(choices, shape, recipe, sensitivity)
    choices = explained(choices, shape, sink_map, recipe, sensitivity, solved.explained if solved else frozenset())
    choices = spare_sinks(choices, shape, sink_map, recipe)
    if solved:
        check_engine(choices, shape, recipe)
    check_group_sizes(choices, shape)
    excluded = check_exclusion(recipe, kv_cache)
    left_out = recipe.kv_cache_scheme is not None and recipe.kv_cache_scheme.sinks == "exclude"
    sinks = sink_selectors(sink_map, recipe) if recipe.protect.tokens or left_out else []
    statistics = recipe.statistics
    if statistics == "exclude":
        # Every token reads the sink: leaving it out is only harmless where its keys and values stay as they were.
        own = [] if kv_cache is None else kv_cache.prefix[len(kv_cache.front):]
        if not own:
            raise RequestError(f"protect.statistics {NEEDS_PREFIX}")
        sinks = [WeighedSink(token_id=token, position=place) for place, token in enumerate(own)]
    transforms = choose_transforms(choices, shape, recipe, kv_cache)
    plan = finish("sink_aware", choices, shape, recipe, sinks, statistics, transforms)
    if excluded:
        plan.calibration.ranges = "exclude"
        plan.notes.append(EXCLUDED)
    plan = with_silenced_heads(with_pruning(plan, shape, sink_map, recipe), sink_map, recipe)
    plan = plan.model_copy(update={"kv_cache": kv_cache})
    require_engine(recipe.engine, plan, shape)
    if sensitivity is not None:
        plan = with_expected_loss(plan, sensitivity, solved.gap if solved else None)
    check_distill(plan, shape)
    require_methods(plan)
    return plan.made_from(sink_map)


def make_control(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, aware: Plan,
                 sensitivity: Sensitivity | None = None) -> Plan:
    """The same recipe with every protection off; the bytes that protection cost are spent on more bits or smaller
    groups, spread evenly over the model, so that both have one size. Beside a plan that was solved for, the control is
    uniform: it starts from the fewest bits that the solver might have taken.

    Args:
        aware: the plan to be matched.
        sensitivity: lets the control predict its loss as well.
    """
    recipe = asked_of_edited(aware, recipe, shape)
    if recipe.budget.solved:
        recipe = recipe.changed(weights={"bits": bits_tried(recipe)[0]})
    base, allowed = unprotected(shape, recipe), sum(decision.bytes for decision in aware.modules.values())
    fewer = [bits for bits in scheme_for(recipe).bits if bits < recipe.weights.bits]
    while fewer and linear_bytes(shape, base) > (1 + MUCH) * allowed:  # an edited plan may take less than its recipe
        recipe = recipe.changed(weights={"bits": fewer.pop()})
        base = unprotected(shape, recipe)
    if recipe.solves_inputs:  # nothing of what inputs are rounded to is for the sinks
        base = {module: replace(choice, activations=aware.modules[module].activations,
                                activation_scale=aware.modules[module].activation_scale) if choice.quantized else choice
                for module, choice in base.items()}
    transforms = [one for one in aware.transforms if one.name != "scale"]  # that is for sink columns
    plan = finish("control", _evenly(base, shape, allowed), shape, recipe, [], "all", transforms)
    over = plan.weight_bytes - aware.weight_bytes
    if over > MUCH * aware.weight_bytes:  # More packed modules make a longer header: much, in a tiny model.
        plan = finish("control", _evenly(base, shape, allowed - over), shape, recipe, [], "all", transforms)
    gap = (plan.weight_bytes - aware.weight_bytes) / aware.weight_bytes
    if abs(gap) > 0.01:
        why = "its recipe takes as much even in the fewest bits" if gap > 0 else "no raise fits the bytes that are left"
        plan.notes.append(f"{SIZE_DIFFERS} {gap:+.1%}: {why}")
    plan = with_small_heads(prune_like(plan, aware, shape), aware, sink_map)
    # Edited or not: what decides between the two is the sinks alone.
    settings = aware.calibration.model_copy(update={"sinks": [], "statistics": "all", "ranges": "all"})
    plan = plan.model_copy(update={"kv_cache": make_kv_control(aware.kv_cache), "calibration": settings,
                                   "seed": aware.seed})
    if sensitivity is not None:  # what its cache loses is not known: others were measured with the plan's exact tokens
        plan = with_expected_loss(plan, sensitivity.model_copy(update={"kv": []}))
    return plan.made_from(sink_map)


def _evenly(base: dict[str, Draft], shape: ModelShape, allowed: int) -> dict[str, Draft]:
    """Raise `base` to `allowed` bytes, all depths alike."""
    why = "the control spends evenly what protection costs"
    choices = fill(base, shape, allowed - linear_bytes(shape, base), evenly_spread(list(shape.linears)), why)
    if allowed - linear_bytes(shape, choices) <= EVEN_TOLERANCE * allowed:
        return choices
    # Where the formats are coarse, one large raise may fit better than what an even spread began.
    attempts = [close_gap(start, base, shape, allowed - linear_bytes(shape, start), why) for start in (choices, base)]
    return max(attempts, key=lambda attempt: linear_bytes(shape, attempt))


def finish(name: str, choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
           sinks: list[WeighedSink], statistics: Statistics, transforms: list[Transform]) -> Plan:
    """The plan of formats that are decided: head and embedding, scales of the KV cache, sizes, engines and notes.

    Raises:
        RequestError: no checkpoint of one kind holds all of it.
    """
    formats = {module: c.form for module, c in choices.items() if c.quantized}
    if not formats and recipe.methods and scheme_for(recipe).foreign:
        raise RequestError(f"the plan leaves every linear in 16 bits, and of such a model sinkquant makes no file of "
                           f"{recipe.backend}; ask for fewer bits or a smaller budget.")
    own = own_format(shape, formats)
    if own and any(scheme_of(form).foreign for form in formats.values()):
        raise RequestError(NO_BACKEND)
    if own and any(choice.quantized and (not scheme_of(choice.form).beside or choice.activations != "16-bit")
                   for choice in choices.values()):
        raise RequestError(NO_INPUTS)
    if own and any(shape.linears[module].part_of for module in formats):
        raise RequestError(NO_EXPERTS)
    require_loadable(shape, formats, own)
    after = shape_after(transforms, shape)
    ends = choose_ends(shape, recipe, len(after.tensors) > len(shape.tensors))
    if own and ends:
        raise RequestError(OWN_FORMAT)
    kv_scheme = make_kv_scheme(shape, recipe)
    if own and kv_scheme is not None:
        raise RequestError(NO_KV_SCHEME)
    if kv_scheme is not None and not (formats or ends):
        raise RequestError("kv_cache_scheme stands in the configuration of packed weights, and nothing is packed; "
                           "quantize some linears, or leave it out.")
    total = checkpoint_bytes(with_kv_scales(with_ends(after, ends), kv_scheme), formats)
    unquantized = checkpoint_bytes(shape, {})
    modules = {
        module: ModuleDecision(bits=c.bits, group_size=c.group_size, method=c.method, keep=c.keep,  # type: ignore[arg-type]
                               columns=list(c.columns), scalars=list(c.scalars), storage=c.form.storage,
                               bytes=choice_bytes(shape, module, c), reason=c.reason, **_inputs(c))
        for module, c in choices.items()}
    if recipe.weights.tune and any(shape.linears[module].part_of for module in formats):
        raise RequestError(TUNE_AND_EXPERTS)
    of_inputs = average_bits({module: choices[module].activations for module in formats}, shape)
    said = [f"{INPUT_BITS} {of_inputs:.2f} bits on average over the weights that they are multiplied with"]
    return Plan(
        name=name, bits_per_weight=8 * linear_bytes(shape, choices) / shape.weights,
        bits_per_parameter=8 * total / shape.values, weight_bytes=total, unquantized_bytes=unquantized,
        modules=modules, transforms=transforms, seed=recipe.seed, recipe=recipe.model_dump(mode="json"),
        calibration=calibration(recipe, sinks, statistics),
        predicted={"weight_bytes": float(total), "size_ratio": total / unquantized},
        loads_in=loads_in(shape, formats | {module: end.form for module, end in ends.items()}, own, kv_scheme),
        ends=ends, kv_scheme=kv_scheme,
        notes=[*shape.notes, *simulated_notes(choices), *notes(choices.values(), recipe), *end_notes(shape, ends),
               *(said if recipe.solves_inputs else [])])


def _inputs(choice: Draft) -> dict[str, Any]:
    """The fields of a decision that say what its inputs are rounded to; a linear that is left alone has none."""
    if not choice.quantized:
        return {}
    return {"kind": choice.kind, "activations": choice.activations, "activation_scale": choice.activation_scale}
