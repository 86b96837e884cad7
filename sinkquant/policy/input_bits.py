"""What every linear's inputs are rounded to under a budget of average bits, by what rounding them was measured to lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sinkquant.artifacts import ModelShape, Sensitivity
from sinkquant.artifacts.sensitivity import InputSensitivity
from sinkquant.errors import RequestError
from sinkquant.policy.engines import engine_takes
from sinkquant.policy.rules import Draft
from sinkquant.policy.solver import Option, least_loss
from sinkquant.recipe import Recipe
from sinkquant.schemes import input_format, scheme_of
from sinkquant.schemes.inputs import NO_ROUNDING, deployed


@dataclass(frozen=True)
class InputOption:
    """What inputs may be rounded to: a format and what its scales are of; null with 16 bits."""

    name: str
    scale: str | None

    @property
    def bits(self) -> int:
        """Of a number."""
        return input_format(self.name).bits


LEFT_ALONE = InputOption(NO_ROUNDING, None)


def check_solvable_inputs(recipe: Recipe) -> None:
    """Refuse a budget of inputs' bits where the inputs that are looked at are not those that will be rounded."""
    if not recipe.solves_inputs:
        return
    for key, value in (("rotate", recipe.weights.rotate), ("smooth", recipe.weights.smooth)):
        if value != "none":
            raise RequestError(f"weights.{key}={value} changes the inputs that activations.bits is measured on; set it "
                               "to none, or leave activations.bits out.")


def input_options(choice: Draft, engine: str) -> list[InputOption]:
    """What the inputs of a linear may be rounded to instead: as the recipe has it, and whatever of more bits engines
    are told to multiply its weights with, in 16 bits last; where the recipe names an engine, what it runs of that.
    Nothing where they are not rounded at all."""
    if not choice.quantized or choice.activations == NO_ROUNDING:
        return []
    scheme, asked = scheme_of(choice.form), InputOption(choice.activations, choice.activation_scale)
    finer = [InputOption(name, scheme.scales_of_inputs(name)[0]) for name in scheme.inputs
             if deployed(name) and input_format(name).bits > asked.bits]
    return [asked, *(one for one in (*finer, LEFT_ALONE) if engine_takes(engine, replace(
        choice, activations=one.name, activation_scale=one.scale).form))]


def with_input_bits(choices: dict[str, Draft], shape: ModelShape, recipe: Recipe,
                    sensitivity: Sensitivity | None) -> dict[str, Draft]:
    """The choices with the inputs that lose least within `activations.bits`, each with its reason.

    Raises:
        RequestError: nothing was measured, or the budget is below what the coarsest formats take.
    """
    allowed = recipe.activations.bits
    if allowed is None:
        return choices
    if sensitivity is None or not sensitivity.inputs:
        raise RequestError("activations.bits needs sensitivities of the inputs; make them with "
                           "sinkquant.find_sensitivity, or run quantize-model plan, which makes them itself.")
    foreign = [name for unit in sensitivity.inputs for name in unit.modules if name not in choices]
    if foreign:
        raise RequestError(f"the sensitivities are of another model: it has no {foreign[0]}; make them for this one.")
    units = [unit for unit in sensitivity.inputs
             if all(input_options(choices[name], recipe.named_engine) for name in unit.modules)]
    tables = [_options(unit, choices[unit.modules[0]], recipe.named_engine) for unit in units]
    weights = [sum(shape.linears[name].parameters for name in unit.modules) for unit in units]
    found = least_loss([[Option(option.bits * size, loss) for option, loss in table.items()]
                        for table, size in zip(tables, weights, strict=True)], math.floor(allowed * sum(weights)))
    if found is None:
        raise _not_feasible(allowed, min(option.bits for table in tables for option in table))
    chosen, total = dict(choices), sum(next(iter(table.values())) for table in tables)
    for unit, table, place in zip(units, tables, found.chosen, strict=True):
        option = list(table)[place]
        for name in unit.modules:
            chosen[name] = replace(choices[name], activations=option.name, activation_scale=option.scale,
                                   reason=f"{choices[name].reason}; {_why(unit, table, option, total)}")
    return chosen


def require_input_bits(choices: dict[str, Draft], recipe: Recipe) -> None:
    """Refuse a budget below what the coarsest formats take, or of which the engine leaves no choice, before anything is
    measured."""
    engine = recipe.named_engine
    asked = [(choice, found) for choice in choices.values() if (found := input_options(choice, engine))]
    least = min((option.bits for _, found in asked for option in found), default=0)
    if recipe.activations.bits is not None and least > recipe.activations.bits:
        raise _not_feasible(recipe.activations.bits, least)
    # Weights that the engine does not run as they are may become others by a budget, or are refused for that.
    if asked and all(len(found) == 1 and engine_takes(engine, choice.form) for choice, found in asked):
        raise RequestError(f"{engine} runs these weights with inputs in {asked[0][0].activations} alone, so that there "
                           "is nothing to choose; leave activations.bits out, or the engine.")


def _not_feasible(allowed: float, least: int) -> RequestError:
    return RequestError(f"activations.bits {allowed:g} is not feasible: inputs take {least} bits at least; raise it to "
                        "that, or set another activations.format.")


def average_bits(inputs: Mapping[str, str], shape: ModelShape) -> float:
    """Over the weights of linears, each with the bits of what it is multiplied with. inputs: module -> format."""
    sizes = {name: shape.linears[name].parameters for name in inputs}
    return sum(input_format(form).bits * sizes[name] for name, form in inputs.items()) / max(sum(sizes.values()), 1)


def _options(unit: InputSensitivity, choice: Draft, engine: str) -> dict[InputOption, float]:
    """Option -> nats per token, the coarsest first.

    Raises:
        RequestError: the unit was measured under another recipe.
    """
    known = {InputOption(loss.activations, loss.scale): loss.total for loss in unit.losses} | {LEFT_ALONE: 0.0}
    wanted = input_options(choice, engine)
    if any(option not in known for option in wanted):
        raise RequestError(f"the sensitivities know nothing of {unit.modules[0]} with inputs in "
                           f"{next(option.name for option in wanted if option not in known)}; make them anew.")
    return {option: known[option] for option in wanted}


def _why(unit: InputSensitivity, table: dict[InputOption, float], option: InputOption, total: float) -> str:
    coarsest = next(iter(table))
    lost = table[coarsest]
    through = next(loss.sinks for loss in unit.losses if loss.activations == coarsest.name)
    figures = (f"{coarsest.name} is predicted to lose {lost:.2g} nats there, {lost / max(total, 1e-30):.1%} of what it "
               f"loses everywhere, {through / max(lost, 1e-30):.0%} of it through sinks")
    if option == LEFT_ALONE:
        return f"its inputs stay in 16 bits: {figures}"
    finer = "" if option == coarsest else f"; {option.name} {table[option]:.2g}"
    return f"its inputs take {option.name} per {option.scale}: {figures}{finer}"
