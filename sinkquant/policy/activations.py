"""What the inputs of every linear are rounded to, and where the sinks ask for more than one scale for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sinkquant.artifacts import KVCachePlan, ModelShape, ModuleDecision, ModuleStatistics, SinkMap
from sinkquant.errors import RequestError
from sinkquant.policy.rules import Draft
from sinkquant.recipe import Activations, Recipe
from sinkquant.schemes import input_format, scheme_of
from sinkquant.schemes.registry import multiplied_with, of_backend


def with_inputs(choices: dict[str, Draft], shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """The recipe's input format for every linear whose weights are quantized; experts read 16 bits, since transformers
    rounds the inputs of nn.Linear alone.

    Raises:
        RequestError: FP8 with weights that no engine multiplies with FP8 inputs, or no quantized linear at all.
    """
    settings = recipe.activations
    if settings.format == "16-bit":
        return choices
    if not any(choice.quantized for choice in choices.values()):
        raise RequestError(f"activations.format {settings.format} rounds the inputs of quantized linears, and the "
                           "recipe leaves all weights alone; quantize some, or set activations.format=16-bit.")
    if settings.scale not in (held := input_format(settings.format).scales):
        raise RequestError(_other_scale(settings.format, held, settings.scale))
    for name, choice in choices.items():
        if not choice.quantized:
            continue
        scheme = multiplied_with(scheme_of(choice.form), settings.format)
        if settings.scale not in (held := scheme.scales_of_inputs(settings.format)):
            raise RequestError(_other_scale(f"{settings.format} beside {scheme.words}", held, settings.scale))
        if why := scheme.refuses(name, choice.bits, choice.group_size, choice.method):
            raise RequestError(why)
        if recipe.weights.tune and not scheme.tunable:
            raise RequestError(f"{scheme.words} are not tuned; set weights.tune=0.")
    kind = input_format(settings.format).kind
    rounded = {name: replace(choice, kind=kind, activations=settings.format, activation_scale=settings.scale)
               for name, choice in choices.items() if choice.quantized and not shape.linears[name].part_of}
    return choices | rounded


def _other_scale(what: str, held: Sequence[str], asked: str) -> str:
    return (f"activations.format {what} has a scale per {' or '.join(held)}, not per {asked}; set "
            f"activations.scale={held[0]}.")


def spares(settings: Activations) -> bool:
    """Whether linears whose stored range the sinks would set are treated apart. Groups have scales of their own
    already, so that "dynamic" changes nothing in a format with a stored scale over those."""
    return settings.ranged and (settings.sinks == "16-bit" or (settings.sinks == "dynamic"
                                                               and settings.scale == "tensor"))


def spare_sinks(choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> dict[str, Draft]:
    """Linears whose static range the sinks would set, or in which that range drowns the typical token, get a scale per
    token, or inputs of 16 bits, as the recipe says; with all that engines fuse with them."""
    settings = recipe.activations
    if settings.format == "16-bit" or not spares(settings):
        return choices
    chosen = dict(choices)
    for name, statistics in sink_map.modules.items():
        if name not in chosen or not (why := _too_wide(statistics, settings)):
            continue
        for member in shape.linears[name].fused_with or [name]:
            choice = chosen[member]
            if not choice.quantized or not input_format(choice.activations).stored(choice.activation_scale):
                continue
            if settings.sinks == "dynamic":
                chosen[member] = replace(choice, activation_scale="token",
                                         reason=f"{choice.reason}; its inputs get a scale per token: {why}")
            else:
                chosen[member] = replace(choice, activations="16-bit", activation_scale=None,
                                         reason=f"{choice.reason}; its inputs stay in 16 bits: {why}")
    return chosen


def _too_wide(statistics: ModuleStatistics, settings: Activations) -> str:
    """Why one stored scale does not do for an input, in words; empty where it does."""
    largest, others = statistics.input_max, statistics.input_max_without_sinks
    if largest > settings.range_ratio * others:
        return f"sinks set their range ({largest:.3g} against {others:.3g} elsewhere)"
    typical = statistics.input_typical
    if (settings.scale == "tensor" and input_format(settings.format).even and typical is not None
            and largest > settings.typical_ratio * typical > 0):
        return f"one stored scale would drown a typical token's (range {largest:.3g}, typical {typical:.3g})"
    return ""


def check_exclusion(recipe: Recipe, kv_cache: KVCachePlan | None) -> bool:
    """Whether static ranges leave the exact prefix out.

    Raises:
        RequestError: they are to, and there is none: sinks would then be clipped.
    """
    settings = recipe.activations
    if settings.format == "16-bit" or not settings.ranged or settings.sinks != "exclude":
        return False
    if kv_cache is None or not kv_cache.prefix:
        raise RequestError("activations.sinks 'exclude' clips the sinks unless they never come through the quantized "
                           "linears: set kv_cache.prefix=bos or found, or use 'dynamic'.")
    return True


def check_inputs(name: str, decision: ModuleDecision) -> None:
    """Refuse inputs that an edited plan gives and nothing could carry out.

    Raises:
        RequestError: a format without a scale or the other way round, or one that does not go with the weights.
    """
    rounded = decision.activations != "16-bit"
    if rounded != (decision.activation_scale is not None):
        raise RequestError(f"the plan gives {name} activations {decision.activations!r} with the activation_scale "
                           f"{decision.activation_scale!r}; '16-bit' goes with null, all others with 'token' or "
                           "'tensor'.")
    if rounded and decision.bits == 16:
        raise RequestError(f"the plan rounds the inputs of {name}, whose weights stay in 16 bits; give it "
                           "activations '16-bit'.")
    if decision.bits == 16:
        return
    scheme = scheme_of(decision.form)
    if decision.activations not in scheme.inputs:
        goes = "; ".join(f"{' or '.join(map(repr, one.inputs[1:]))} goes with {one.kind!r}"
                         for one in of_backend(scheme.backend) if one.inputs[1:])
        raise RequestError(f"the plan gives {name} {decision.activations} activations and weights of the kind "
                           f"{decision.kind!r}; {goes or f'{scheme.backend} leaves inputs in 16 bits'}.")
    if rounded and decision.activation_scale not in (held := scheme.scales_of_inputs(decision.activations)):
        raise RequestError(f"the plan gives {name} {decision.activations} activations with a scale per "
                           f"{decision.activation_scale}; they have one per {' or '.join(held)}.")
    if scheme.refuses(name, decision.bits, decision.group_size, decision.method):
        raise RequestError(f"the plan gives {name} {scheme.words}, which take {' or '.join(map(str, scheme.bits))} "
                           f"bits, group_size {scheme.group_size} and the method "
                           f"{' or '.join(map(repr, scheme.methods or ()))}.")


def simulated_notes(choices: dict[str, Draft]) -> list[str]:
    """A sentence for every input format that no checkpoint can ask for."""
    forms = sorted({c.activations for c in choices.values() if c.quantized and c.activations != "16-bit"
                    and not input_format(c.activations).deployed})
    return [f"{form} activations are simulated: sinkquant rounds inputs when it evaluates, no engine does, and the "
            "checkpoint holds the quantized weights alone" for form in forms]


EXCLUDED = ("static ranges leave the exact prefix out: the checkpoint is right only where rows start from the keys and "
            "values in kv_prefix; an engine that computes the prefix itself clips the sinks")
"""What a reader of such a plan has to know."""
