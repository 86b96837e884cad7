"""A plan that a person has edited: checked against the model, its sizes counted anew."""

from __future__ import annotations

from sinkquant.artifacts import LinearShape, ModelShape, ModuleDecision, Plan
from sinkquant.artifacts.conflicts import check_conflicts
from sinkquant.artifacts.distill import check_distill
from sinkquant.artifacts.experts import mixed_experts
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED, require_methods
from sinkquant.policy.activations import check_inputs
from sinkquant.policy.carried import check_choices
from sinkquant.policy.ends import asked_of_edited, check_counted, end_notes
from sinkquant.policy.engines import require_engine
from sinkquant.policy.expected import NOT_PREDICTED, PREDICTED, SOLVED_FOR
from sinkquant.policy.heads import accept_heads
from sinkquant.policy.kv_cache import accept_kv
from sinkquant.policy.plan import INPUT_BITS, NEEDS_PREFIX, SIZE_DIFFERS, finish
from sinkquant.policy.pruning import keep_pruning
from sinkquant.policy.rules import Draft, check_group_sizes
from sinkquant.policy.transforms import check_transforms
from sinkquant.recipe import Recipe, near_miss
from sinkquant.schemes import WeightFormat

OF_FIGURES = (SOLVED_FOR, PREDICTED, NOT_PREDICTED, INPUT_BITS, SIZE_DIFFERS)
"""Beginnings of notes."""


def accept_edited(plan: Plan, shape: ModelShape) -> Plan:
    """The plan with all that follows from its bits and group sizes counted anew: bytes, averages, engines.

    Raises:
        RequestError: it lacks a linear of the model or has one too many, a format is out of range, or linears that
            engines fuse do not share one; or the recipe's engine does not run it.
    """
    foreign = sorted(set(plan.modules) - set(shape.linears))
    if foreign:
        raise RequestError(f"the plan names {foreign[0]!r}, which this model does not have"
                           f"{near_miss(foreign[0], shape.linears)}.")
    missing = [name for name in shape.linears if name not in plan.modules]
    if missing:
        raise RequestError(f"the plan lacks {missing[0]!r}; give it 16 bits to leave it alone.")
    for name in plan.modules:
        _check(name, plan, shape)
    if plan.calibration.ranges == "exclude" and not (plan.kv_cache and plan.kv_cache.prefix):
        raise RequestError("the plan's static ranges leave out the tokens of a prefix that its kv_cache does not have; "
                           "set calibration.ranges to 'all'.")
    if plan.calibration.statistics == "exclude" and not (
            plan.kv_cache and plan.kv_cache.prefix[len(plan.kv_cache.front):]):
        raise RequestError(f"the plan's calibration.statistics: {NEEDS_PREFIX}")
    mixed = mixed_experts(shape, {name: decision.form for name, decision in plan.modules.items()})
    if mixed:
        raise RequestError(f"the plan gives {mixed[0]} and {mixed[1]} different formats, but transformers loads all "
                           "packed experts in one, and a layer's all packed or all dense; make them agree.")
    choices = {name: Draft(bits=d.bits, group_size=d.group_size, method=d.method, keep=d.keep,
                           columns=tuple(d.columns), reason=d.reason, kind=d.kind, activations=d.activations,
                           activation_scale=d.activation_scale, scalars=tuple(d.scalars), storage=d.storage)
               for name, d in plan.modules.items()}
    check_group_sizes(choices, shape)
    check_transforms(plan.transforms, shape, plan.kv_cache)
    check_choices(choices, shape)
    recipe = asked_of_edited(plan, Recipe.parse(plan.recipe), shape)
    counted = finish(plan.name, choices, shape, recipe, plan.calibration.sinks,
                      plan.calibration.statistics, plan.transforms)
    check_counted(plan, counted)
    if plan.kv_scheme != counted.kv_scheme:
        raise RequestError("the plan's kv_scheme is not that of its recipe; edit recipe.kv_cache_scheme too.")
    counted = keep_pruning(counted, plan, shape)
    counted = counted.model_copy(update={"calibration": plan.calibration, "kv_cache": accept_kv(plan.kv_cache, shape),
                                         "silenced_heads": accept_heads(plan, shape), "seed": plan.seed,
                                         "blocks": plan.blocks,
                                         "notes": list(dict.fromkeys([*_lasting(plan, shape), *counted.notes]))})
    require_engine(Recipe.parse(plan.recipe).engine, counted, shape)
    check_conflicts(counted)
    check_distill(counted, shape)
    require_methods(counted)
    return counted


def _lasting(plan: Plan, shape: ModelShape) -> list[str]:
    """The notes that an edit leaves true: none of figures that are counted anew, or that the plan was solved by."""
    counted = {*end_notes(shape, plan.ends)}
    return [note for note in plan.notes if note not in counted and not note.startswith(OF_FIGURES)]


def _check(name: str, plan: Plan, shape: ModelShape) -> None:
    decision = plan.modules[name]
    if not (2 <= decision.bits <= 8 or decision.bits == 16):
        raise RequestError(f"the plan gives {name} {decision.bits} bits; give it 2 to 8, or 16 to leave it alone.")
    if (decision.bits == 16) != (decision.method == UNTOUCHED):
        raise RequestError(f"the plan gives {name} {decision.bits} bits and the method {decision.method!r}; "
                           f"{UNTOUCHED!r} belongs to 16 bits, a method to fewer.")
    if decision.bits < 16 and shape.linears[name].fixed:
        raise RequestError(f"the plan gives {name} {decision.bits} bits, but it has to stay in 16: "
                           f"{shape.linears[name].fixed}.")
    _check_beside(name, decision, shape.linears[name])
    for twin in [] if shape.linears[name].part_of else shape.linears[name].fused_with:
        other = plan.modules.get(twin)
        if other is not None and not other.shares_format(decision):
            raise RequestError(f"the plan gives {name} and {twin} different formats, but engines fuse them; "
                               "give both the same bits, group_size, activations and split columns.")
    check_inputs(name, decision)
    if shape.linears[name].part_of and decision.form != WeightFormat(decision.bits, decision.group_size):
        raise RequestError(f"the plan rounds the inputs of the expert {name}, which transformers does not; give it "
                           "activations '16-bit' and weights of the kind 'int'.")


def _check_beside(name: str, decision: ModuleDecision, linear: LinearShape) -> None:
    """What stands beside the codes must lie in the weight, once, and only where there are codes."""
    if decision.bits == 16 and (decision.keep == "split" or decision.scalars):
        raise RequestError(f"the plan splits {name}, which it leaves in 16 bits; give it 2 to 8 bits, or no 'split'.")
    outside = [c for c in decision.columns if not 0 <= c < linear.columns]
    outside += [c for r, c in decision.scalars if not (0 <= r < linear.rows and 0 <= c < linear.columns)]
    if outside:
        raise RequestError(f"the plan keeps column {outside[0]} of {name}, which has {linear.columns} input columns "
                           f"and {linear.rows} rows.")
    ascending = decision.columns == sorted(set(decision.columns))
    twice = len(set(decision.scalars)) < len(decision.scalars) or (
        decision.keep == "split" and any(column in decision.columns for _, column in decision.scalars))
    if (decision.keep == "split" and not ascending) or twice:
        raise RequestError(f"the plan's columns of {name} must be ascending, and its scalars in none of them, each "
                           "once.")
