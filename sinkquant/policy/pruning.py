"""Which linears are pruned, and how: added to a plan whose formats are decided."""

from __future__ import annotations

from sinkquant.artifacts import ModelShape, ModuleDecision, Plan, SinkMap
from sinkquant.artifacts.pruning import Pruning, pattern_group
from sinkquant.artifacts.sizes import module_bytes
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED
from sinkquant.policy.rules import match
from sinkquant.recipe import Prune, Recipe
from sinkquant.schemes import WeightFormat


def with_pruning(plan: Plan, shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> Plan:
    """The plan with what the recipe's `prune` section asks for; the plan itself where it asks for nothing.

    Super experts stay as they are unless `prune.massive` is set. The control of a plan is pruned like it, to the same
    pattern; its statistics alone are blind to the sinks.

    Raises:
        RequestError: sparsity and pattern contradict each other, a pattern of `prune.ignore` matches nothing, groups of
            the pattern do not fit a module's columns, or nothing is left to prune.
    """
    settings = recipe.prune
    if settings.method == "none":
        return plan
    asked = Pruning(method=settings.method, sparsity=_sparsity(settings), pattern=settings.pattern)
    ignored = {name for pattern in settings.ignore for name in match(pattern, list(shape.linears), "prune.ignore")}
    spared = set() if settings.massive else _of_super_experts(shape, sink_map)
    chosen = [name for name, linear in shape.linears.items() if not linear.fixed and name not in ignored | spared]
    if not chosen:
        raise RequestError(f"prune.method is {settings.method!r}, but prune.ignore and what has to stay as it is leave "
                           "no module to prune.")
    modules = dict(plan.modules)
    for name in chosen:
        require_fit(name, asked, shape)
        modules[name] = pruned(modules[name], asked)
    notes = [] if not spared else [
        f"{', '.join(f'expert {one.expert} of {one.experts}' for one in sink_map.super_experts)} make the massive "
        "activations and are not pruned; prune.massive=true prunes them like any other"]
    return _counted(plan.model_copy(update={"modules": modules, "notes": [*plan.notes, *notes]}), shape)


def keep_pruning(plan: Plan, edited: Plan, shape: ModelShape) -> Plan:
    """A plan whose sizes were counted anew, with the pruning of the plan that a person has edited.

    Raises:
        RequestError: a pattern and its sparsity contradict each other, or do not fit the module.
    """
    modules = dict(plan.modules)
    for name, decision in edited.modules.items():
        if decision.prune is not None:
            if shape.linears[name].fixed:
                raise RequestError(f"the plan prunes {name}, which has to stay as it is: {shape.linears[name].fixed}.")
            _require_consistent(decision.prune, f"the plan's {name}")
            require_fit(name, decision.prune, shape)
            modules[name] = modules[name].model_copy(update={"prune": decision.prune})
    return _counted(plan.model_copy(update={"modules": modules}), shape)


def prune_like(plan: Plan, other: Plan, shape: ModelShape) -> Plan:
    """A plan with the pruning of another one of the same model."""
    modules = {name: decision if (asked := other.modules[name].prune) is None else pruned(decision, asked)
               for name, decision in plan.modules.items()}
    return _counted(plan.model_copy(update={"modules": modules}), shape)


def pruning_alone(plan: Plan, shape: ModelShape) -> Plan:
    """The same plan without its quantization, so that a report can tell what each of the two costs."""
    left = WeightFormat(16, None)
    modules = {name: decision.model_copy(update={
        "bits": 16, "group_size": None, "method": UNTOUCHED, "keep": None, "columns": [],
        "bytes": module_bytes(shape, name, left)}) for name, decision in plan.modules.items()}
    return plan.model_copy(update={
        "modules": modules, "ends": {}, "kv_cache": None, "kv_scheme": None, "weight_bytes": plan.unquantized_bytes,
        "bits_per_weight": 8 * sum(decision.bytes for decision in modules.values()) / shape.weights,
        "calibration": plan.calibration.model_copy(update={"tune": 0, "distill": 0})})


def require_fit(name: str, pruning: Pruning, shape: ModelShape) -> None:
    """Raises RequestError where whole groups of the pattern do not make up the columns of a module."""
    columns = shape.linears[name].columns
    if pruning.group is not None and columns % pruning.group[1]:
        raise RequestError(f"the pattern {pruning.pattern} does not divide the {columns} input columns of {name}; name "
                           "it in prune.ignore or choose another pattern.")


def pruned(decision: ModuleDecision, pruning: Pruning) -> ModuleDecision:
    """A decision with its pruning, and the reason for it in words."""
    how = f"{decision.reason}; {pruning.sparsity:.0%} of its weights pruned by {pruning.method}"
    reason = how if pruning.group is None else f"{how}, {pruning.pattern}"
    return decision.model_copy(update={"prune": pruning, "reason": reason})


def _of_super_experts(shape: ModelShape, sink_map: SinkMap) -> set[str]:
    """The linears of the experts that make massive activations."""
    return {name for one in sink_map.super_experts for name in shape.linears
            if name.startswith(f"{one.experts}.{one.expert}.")}


def _sparsity(settings: Prune) -> float:
    """The share of weights that go.

    Raises:
        RequestError: the recipe names another one than its pattern has.
    """
    group = pattern_group(settings.pattern)
    if group is None:
        return 0.5 if settings.sparsity is None else settings.sparsity
    implied = 1 - group[0] / group[1]
    if settings.sparsity is not None and abs(settings.sparsity - implied) > 1e-9:
        raise RequestError(f"prune.pattern {settings.pattern!r} sets {implied:g} of the weights to zero, and "
                           f"prune.sparsity says {settings.sparsity:g}; leave prune.sparsity out.")
    return implied


def _require_consistent(pruning: Pruning, what: str) -> None:
    try:
        group = pruning.group
    except ValueError as error:
        raise RequestError(f"{what}: {error}, not {pruning.pattern!r}.") from error
    if not 0 < pruning.sparsity < 1 or (group and abs(pruning.sparsity - 1 + group[0] / group[1]) > 1e-9):
        raise RequestError(f"{what} is pruned by {pruning.sparsity:g} in the pattern {pruning.pattern!r}; make the two "
                           "agree, between 0 and 1.")


def _counted(plan: Plan, shape: ModelShape) -> Plan:
    """The plan with the share of all weights of the linears that it sets to zero among what is predicted."""
    zeros = sum(decision.prune.sparsity * shape.linears[name].parameters
                for name, decision in plan.modules.items() if decision.prune is not None)
    if not zeros:
        return plan
    return plan.model_copy(update={"predicted": plan.predicted | {"sparsity": zeros / shape.weights}})
