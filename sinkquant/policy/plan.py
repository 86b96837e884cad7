"""SinkMap + Recipe -> Plan, and the plan of its control: a sink-unaware twin of the same size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sinkquant.artifacts import (
    Calibration,
    KVCachePlan,
    ModelShape,
    ModuleDecision,
    Plan,
    Sensitivity,
    SinkMap,
    Transform,
    WeighedSink,
)
from sinkquant.artifacts.distill import check_distill
from sinkquant.artifacts.ends import EndDecision, with_ends
from sinkquant.artifacts.experts import TUNE_AND_EXPERTS, require_loadable
from sinkquant.artifacts.kv_scheme import with_kv_scales
from sinkquant.artifacts.plan import Statistics
from sinkquant.artifacts.sizes import checkpoint_bytes, own_format
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED, require_methods
from sinkquant.policy.activations import EXCLUDED, check_exclusion, simulated_notes, spare_sinks, with_inputs
from sinkquant.policy.allocate import Allocation, check_engine, no_candidate, solve, way_out
from sinkquant.policy.budget import choice_bytes, close_gap, evenly_spread, fill, linear_bytes
from sinkquant.policy.carried import carried, check_recipe, notes, scheme_for
from sinkquant.policy.ends import OWN_FORMAT, asked_of_edited, choose_ends, end_notes, end_options, sized
from sinkquant.policy.engines import engine_loads, for_engine, loads_in, require_engine
from sinkquant.policy.expected import with_expected_loss
from sinkquant.policy.explain import explained
from sinkquant.policy.heads import with_silenced_heads, with_small_heads
from sinkquant.policy.input_bits import average_bits, check_solvable_inputs, with_input_bits
from sinkquant.policy.kv_budget import kv_bytes_of, spent_by_loss
from sinkquant.policy.kv_cache import make_kv_control, make_kv_plan
from sinkquant.policy.kv_scheme import OWN_FORMAT as NO_KV_SCHEME
from sinkquant.policy.kv_scheme import make_kv_scheme
from sinkquant.policy.pruning import prune_like, with_pruning
from sinkquant.policy.rules import Draft, affected, base_choices, check_group_sizes, protect
from sinkquant.policy.sharing import share_formats
from sinkquant.policy.solvable import bits_tried, groups_tried
from sinkquant.policy.solver import ROUNDS
from sinkquant.policy.split import NO_BACKEND, NO_EXPERTS, NO_INPUTS, split_channels
from sinkquant.policy.transforms import choose_transforms, scale_sinks, shape_after
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.tensors import total_bytes

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
        choices = _within_budget(base, choices, shape, sink_map, recipe)
    choices = with_input_bits(choices, shape, recipe, sensitivity)
    of_linears = sensitivity if sensitivity is not None and sensitivity.units else None
    choices = explained(choices, shape, sink_map, recipe, of_linears, solved.explained if solved else frozenset())
    choices = spare_sinks(choices, shape, sink_map, recipe)
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
    plan = _finish("sink_aware", choices, shape, recipe, sinks, statistics, transforms)
    if excluded:
        plan.calibration.ranges = "exclude"
        plan.notes.append(EXCLUDED)
    if recipe.solves_inputs:
        bits = average_bits({name: c.activations for name, c in choices.items() if c.quantized}, shape)
        plan.notes.append(f"{INPUT_BITS} {bits:.2f} bits on average over the weights that they are multiplied with")
    plan = with_silenced_heads(with_pruning(plan, shape, sink_map, recipe), sink_map, recipe)
    plan = plan.model_copy(update={"kv_cache": kv_cache})
    require_engine(recipe.engine, plan, shape)
    if sensitivity is not None:
        plan = with_expected_loss(plan, sensitivity, solved.gap if solved else None)
    check_distill(plan, shape)
    require_methods(plan)
    return plan.made_from(sink_map)


def choices_of(shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> tuple[dict[str, Draft], dict[str, Draft]]:
    """A format for every linear before there is a budget: without protection, and with what the recipe protects.

    Raises:
        RequestError: as `make_plan`.
    """
    check_same_model(shape, sink_map)
    check_recipe(recipe)
    check_solvable_inputs(recipe)
    asked = _base(shape, recipe)
    check_group_sizes(asked, shape)
    base = share_formats(with_inputs(asked, shape, recipe), shape)
    protected = scale_sinks(protect(base, shape, sink_map, recipe), shape, sink_map, recipe)
    protected = split_channels(protected, shape, sink_map, recipe)
    found = share_formats(carried(with_inputs(protected, shape, recipe), shape, recipe), shape)
    return for_engine(base, recipe.engine), for_engine(found, recipe.engine)


def formats_asked(shape: ModelShape, recipe: Recipe) -> dict[str, WeightFormat]:
    """Module name -> format of every linear that a recipe packs, as far as that is known before there are sinks.

    Raises:
        RequestError: a pattern matches nothing, or a group size does not fit.
    """
    return {name: choice.form for name, choice in _unprotected(shape, recipe).items() if choice.quantized}


def ends_asked(shape: ModelShape, recipe: Recipe) -> dict[str, EndDecision]:
    """How the token embedding and the output head are stored, by module name.

    Raises:
        RequestError: as `make_plan`.
    """
    return choose_ends(shape, recipe, recipe.weights.rotate == "full" and bool(shape.untied))


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
    base, allowed = _unprotected(shape, recipe), sum(decision.bytes for decision in aware.modules.values())
    fewer = [bits for bits in scheme_for(recipe).bits if bits < recipe.weights.bits]
    while fewer and linear_bytes(shape, base) > (1 + MUCH) * allowed:  # an edited plan may take less than its recipe
        recipe = recipe.changed(weights={"bits": fewer.pop()})
        base = _unprotected(shape, recipe)
    if recipe.solves_inputs:  # nothing of what inputs are rounded to is for the sinks
        base = {module: replace(choice, activations=aware.modules[module].activations,
                                activation_scale=aware.modules[module].activation_scale) if choice.quantized else choice
                for module, choice in base.items()}
    transforms = [one for one in aware.transforms if one.name != "scale"]  # that is for sink columns
    plan = _finish("control", _evenly(base, shape, allowed), shape, recipe, [], "all", transforms)
    over = plan.weight_bytes - aware.weight_bytes
    if over > MUCH * aware.weight_bytes:  # More packed modules make a longer header: much, in a tiny model.
        plan = _finish("control", _evenly(base, shape, allowed - over), shape, recipe, [], "all", transforms)
    gap = (plan.weight_bytes - aware.weight_bytes) / aware.weight_bytes
    if abs(gap) > 0.01:
        why = "its recipe takes as much even in the fewest bits" if gap > 0 else "no raise fits the bytes that are left"
        plan.notes.append(f"{SIZE_DIFFERS} {gap:+.1%}: {why}")
    plan = with_small_heads(prune_like(plan, aware, shape), aware, sink_map)
    # Edited or not: what decides between the two is the sinks alone.
    settings = aware.calibration.model_copy(update={"sinks": [], "statistics": "all", "ranges": "all"})
    plan = plan.model_copy(update={"kv_cache": make_kv_control(aware.kv_cache), "calibration": settings,
                                   "seed": aware.seed})
    if sensitivity is not None:
        plan = with_expected_loss(plan, sensitivity)
    return plan.made_from(sink_map)


def _unprotected(shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """What the recipe asks for of every linear, stored as its engine wants it, before anything is protected."""
    return for_engine(share_formats(with_inputs(_base(shape, recipe), shape, recipe), shape), recipe.engine)


def _base(shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """The recipe's format for every linear as far as its backend can hold it, before anything is protected."""
    return carried(base_choices(shape, recipe), shape, recipe)


def _evenly(base: dict[str, Draft], shape: ModelShape, allowed: int) -> dict[str, Draft]:
    """Raise `base` to `allowed` bytes, all depths alike."""
    why = "the control spends evenly what protection costs"
    choices = fill(base, shape, allowed - linear_bytes(shape, base), evenly_spread(list(shape.linears)), why)
    if allowed - linear_bytes(shape, choices) <= EVEN_TOLERANCE * allowed:
        return choices
    # Where the formats are coarse, one large raise may fit better than what an even spread began.
    attempts = [close_gap(start, base, shape, allowed - linear_bytes(shape, start), why) for start in (choices, base)]
    return max(attempts, key=lambda attempt: linear_bytes(shape, attempt))


def _finish(name: str, choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
            sinks: list[WeighedSink], statistics: Statistics, transforms: list[Transform]) -> Plan:
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
    return Plan(
        name=name, bits_per_weight=8 * linear_bytes(shape, choices) / shape.weights,
        bits_per_parameter=8 * total / shape.values, weight_bytes=total, unquantized_bytes=unquantized,
        modules=modules, transforms=transforms, seed=recipe.seed, recipe=recipe.model_dump(mode="json"),
        calibration=_calibration(recipe, sinks, statistics),
        predicted={"weight_bytes": float(total), "size_ratio": total / unquantized},
        loads_in=loads_in(shape, formats | {module: end.form for module, end in ends.items()}, own, kv_scheme),
        ends=ends, kv_scheme=kv_scheme,
        notes=[*shape.notes, *simulated_notes(choices), *notes(choices.values(), recipe), *end_notes(shape, ends)])


def _inputs(choice: Draft) -> dict[str, Any]:
    """The fields of a decision that say what its inputs are rounded to; a linear that is left alone has none."""
    if not choice.quantized:
        return {}
    return {"kind": choice.kind, "activations": choice.activations, "activation_scale": choice.activation_scale}


def sink_selectors(sink_map: SinkMap, recipe: Recipe) -> list[WeighedSink]:
    """What every sink token weighs in the statistics: as often as it is read, over as often as it stands there, and at
    most `protect.sink_weight`. A delimiter in every sentence is read by the few tokens after it; `<bos>` stands in a
    row once and is read by all of it."""
    selectors = []
    for token in sink_map.placed:
        share = 1 / recipe.calibration.length if token.position is not None else token.share
        weight = min(recipe.protect.sink_weight, max(1.0, token.attention / max(share, 1e-9)))
        selectors.append(WeighedSink(token_id=token.token_id, position=token.position, weight=weight))
    return selectors


def calibration_of(recipe: Recipe, sink_map: SinkMap | None) -> Calibration:
    """The rows that a recipe asks for and what tokens weigh in them, for statistics that are taken beside a plan.

    Args:
        sink_map: None where no token is a sink.
    """
    sinks = sink_selectors(sink_map, recipe) if recipe.protect.tokens and sink_map is not None else []
    return _calibration(recipe, sinks, recipe.statistics)


def _calibration(recipe: Recipe, sinks: list[WeighedSink], statistics: Statistics) -> Calibration:
    settings, weights = recipe.calibration, recipe.weights
    return Calibration(
        text=settings.text, rows=settings.rows, length=settings.length, bos=settings.bos,
        batch_size=settings.batch_size, sinks=sinks, damping=weights.damping, act_order=weights.act_order,
        scale_search=weights.scale_search, descent=weights.descent, tune=weights.tune, distill=weights.distill,
        distill_codes=weights.distill_codes,
        statistics=statistics, min_expert_tokens=settings.min_expert_tokens)


def check_budget(shape: ModelShape, sink_map: SinkMap, recipe: Recipe, kv_cache: KVCachePlan | None) -> None:
    """Refuse a budget of bits or bytes where the fewest are over it, whatever is detected. One that is solved for may
    choose the smallest formats that are tried and its engine loads; where it loads none, any budget is refused.

    Args:
        kv_cache: in the fewest bits that the budget may choose.

    Raises:
        RequestError: as `make_plan`.
    """
    if not recipe.budget.limited:
        return
    base, choices = choices_of(shape, sink_map, recipe)
    if recipe.budget.solved:
        free = [name for name, choice in base.items() if choice.quantized and not choice.pinned]
        base = {name: _smallest_tried(name, choice, shape, recipe) for name, choice in base.items()}
        if free and not any(base[name].quantized for name in free):
            raise no_candidate(shape, recipe.budget.engine)
        recipe = min(end_options(shape, recipe, recipe.budget.engine),
                     key=lambda one: total_bytes(sized(shape, one).tensors.values()))
        check_engine(base, shape, recipe)
    if recipe.budget.loss is None:
        kept = kv_cache.model_copy(update={"expected_exact": 0}) if kv_cache is not None else None
        _room(base, choices, shape, recipe, kv_bytes_of(shape, recipe.budget, kept))


def _smallest_tried(name: str, choice: Draft, shape: ModelShape, recipe: Recipe) -> Draft:
    """A linear in the smallest format that a solved budget could bring it to, the recipe having fixed nothing of it;
    in 16 bits where the engine loads none."""
    if choice.pinned or not choice.quantized:
        return choice
    linear = shape.linears[name]
    tried = [replace(choice, bits=bits, group_size=scheme_of(choice.form).fitted(bits, size, linear.columns))
             for bits in bits_tried(recipe) for size in groups_tried(recipe, [linear.columns], name)]
    loads = [one for one in tried if engine_loads(recipe.budget.engine, one.form, linear)]
    return min(loads, key=lambda one: choice_bytes(shape, name, one),
               default=replace(choice, bits=16, group_size=None, method=UNTOUCHED))


def _room(base: dict[str, Draft], choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
          kv_bytes: int = 0) -> tuple[dict[str, Draft], int, str]:
    """The formats that take the fewest bytes, the bytes that the budget leaves to the linears, and its name.

    Args:
        kv_bytes: of the KV cache, as far as the budget counts it.

    Raises:
        RequestError: these formats take more.
    """
    named = {name: choice for name, choice in choices.items() if choice.keep and choice.pinned}
    floor = share_formats(base | named, shape)
    least = linear_bytes(shape, floor)
    whole = recipe.budget.whole(shape.values)
    if recipe.budget.solved:
        takes, other = "the smallest candidates and what the recipe fixes take", way_out(recipe.budget)
    else:
        takes = "weights.bits and weights.group_size, and what stays in 16 bits, take"
        other = "lower weights.bits"
    if whole is not None:
        smallest = checkpoint_bytes(sized(shape, recipe), {name: c.form for name, c in floor.items() if c.quantized})
        allowed, words = whole - kv_bytes - (smallest - least), f"the budget of {whole:,} bytes"
        if least > allowed:
            (key,), asked = recipe.budget.limits, recipe.budget.in_words(whole, shape.values)
            cache = f" and {kv_bytes:,} of the KV cache" if kv_bytes else ""
            raise RequestError(f"budget.{key} {asked} is not feasible: {takes} a checkpoint of {smallest:,} bytes "
                               f"without any protection{cache}; raise budget.{key} to "
                               f"{recipe.budget.in_words(smallest + kv_bytes, shape.values)}, or {other}.")
    else:
        bits = recipe.budget.limits["bits"]
        allowed, words = int(bits * shape.weights / 8), f"the budget of {recipe.budget.bits} bits"
        if least > allowed:
            # Rounded up, so that the number in the message is itself feasible.
            fewest = math.ceil(8000 * least / shape.weights) / 1000
            raise RequestError(f"budget.bits {bits:g} is not feasible: {takes} {fewest:.3f} bits per weight without "
                               f"any protection; raise budget.bits to that, or {other}.")
    return floor, allowed, words


def _within_budget(base: dict[str, Draft], choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap,
                   recipe: Recipe) -> dict[str, Draft]:
    floor, allowed, words = _room(base, choices, shape, recipe)
    order = [name for name, _ in affected(shape, sink_map)]
    order += [name for name in evenly_spread(list(shape.linears)) if name not in order]
    # Protections that the budget cannot pay are given up from the least affected on.
    for name in reversed(order):
        if linear_bytes(shape, choices) <= allowed:
            break
        if choices[name].keep not in (None, "scale") and not choices[name].pinned:
            choices = choices | {
                member: replace(floor[member], reason=f"{floor[member].bits} bits: {words} does not pay for its "
                                                      f"protection ({choices[member].why})")
                for member in shape.linears[name].fused_with or [name]}
    whole, spent = recipe.budget.whole(shape.values), linear_bytes(shape, choices)
    filled = fill(choices, shape, allowed - spent, order, f"{words} allows it", recipe.engine)
    for _ in range(ROUNDS if whole is not None else 0):
        packed = {n: c.form for n, c in filled.items() if c.quantized}
        over = checkpoint_bytes(sized(shape, recipe), packed) - (whole or 0)
        if over <= 0:
            break
        # The header of the files is longer for longer numbers.
        filled = fill(choices, shape, max(0, linear_bytes(shape, filled) - over - spent), order, f"{words} allows it",
                      recipe.engine)
    return filled


def check_same_model(shape: ModelShape, sink_map: SinkMap) -> None:
    """Refuse the sink map of another model.

    Raises:
        RequestError: it is of another architecture or size, or names linears that the model does not have.
    """
    facts = sink_map.model
    foreign = any(name not in shape.linears for name in sink_map.modules)
    # Persistent buffers count in the shape alone, so that the two numbers may differ a little.
    other_size = not math.isclose(facts.parameters, shape.parameters, rel_tol=0.01)
    if foreign or other_size or facts.layers != shape.blocks or facts.architecture != shape.architecture:
        raise RequestError(f"the sink map is of another model ({facts.name}, {facts.architecture}, {facts.layers} "
                           f"layers, {facts.parameters} parameters); run detect on this one.")
