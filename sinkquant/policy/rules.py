"""The rules that turn what was found into what to do: a format and a reason for every linear. Recipes name linears by
globs, or by regular expressions after "re:"."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.errors import RequestError
from sinkquant.methods import UNTOUCHED
from sinkquant.recipe import Recipe
from sinkquant.schemes import PLAIN, WeightFormat, scheme_of, stored_form
from sinkquant.schemes.weight_format import Kind

MIN_SINK_ENERGY = 0.05
"""A linear in which sink tokens give less of trace(H) is not theirs."""
NAMED = 3
"""A reason lists no more super weights than that."""


@dataclass(frozen=True)
class Draft:
    """What a plan in the making says of one linear, before it becomes a `ModuleDecision`. `bits` 16: left alone;
    `pinned`: the recipe names it, so that neither a rule nor a budget changes it; `why`: what it is kept for; `kind`,
    `activations` and `activation_scale` as in `ModuleDecision`."""

    bits: int
    group_size: int | None
    method: str
    reason: str
    keep: str | None = None
    columns: tuple[int, ...] = field(default_factory=tuple)
    pinned: bool = False
    why: str = ""
    kind: Kind = "int"
    activations: str = "16-bit"
    activation_scale: str | None = None
    storage: str = PLAIN
    scalars: tuple[tuple[int, int], ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the linear is packed at all."""
        return self.bits < 16

    @property
    def form(self) -> WeightFormat:
        """How the weights will be stored."""
        return stored_form(self.bits, self.group_size, self.kind, self.activations, self.activation_scale, self.storage,
                           len(self.columns) if self.keep == "split" else 0, len(self.scalars))


def base_choices(shape: ModelShape, recipe: Recipe) -> dict[str, Draft]:
    """The recipe's format for every linear, before anything is protected.

    Raises:
        RequestError: a pattern without a match, or nothing left to quantize.
    """
    weights = recipe.weights
    names = list(shape.linears)
    plain = Draft(weights.bits, weights.group_size, weights.method,
                  f"{weights.bits} bits: as weights.bits asks")
    choices = dict.fromkeys(names, plain)
    for index, override in enumerate(weights.overrides):
        for name in match(override.pattern, names, f"weights.overrides[{index}]"):
            if override.bits > 8:
                choices[name] = Draft(16, None, UNTOUCHED, f"left in 16 bits by the override {override.pattern!r}",
                                      pinned=True)
            else:
                choices[name] = Draft(override.bits, override.group_size or weights.group_size,
                                      override.method or weights.method,
                                      f"{override.bits} bits by the override {override.pattern!r}", pinned=True)
    for pattern in weights.ignore:
        for name in match(pattern, names, "weights.ignore"):
            choices[name] = Draft(16, None, UNTOUCHED, f"left in 16 bits by weights.ignore {pattern!r}", pinned=True)
    asked = any(choice.quantized for choice in choices.values())
    for name, linear in shape.linears.items():
        if linear.fixed:
            choices[name] = Draft(16, None, UNTOUCHED, f"left in 16 bits, {linear.fixed}", pinned=True)
    # A recipe may leave all weights alone and pack the cache, or prune; weights that it asks for are never left alone
    # unsaid.
    other_work = recipe.kv_cache is not None or recipe.prune.asked
    if (asked or not other_work) and not any(choice.quantized for choice in choices.values()):
        reasons = sorted({linear.fixed for linear in shape.linears.values() if linear.fixed})
        why = reasons[0] if reasons else "weights.ignore and weights.overrides leave nothing"
        hint = "" if recipe.kv_cache is None else "; to pack the KV cache alone set weights.ignore=['*']"
        raise RequestError(f"{shape.architecture} has nothing that can be quantized: {why}{hint}.")
    return choices


def protect(choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> dict[str, Draft]:
    """Raise the linears that the sinks dominate to `protect.bits`, the most affected first, up to `max_share` of all
    weights of the linears; modules named by `protect.modules` in any case.

    Raises:
        RequestError: a pattern of `protect.modules` without a match.
    """
    chosen = dict(choices)
    room = recipe.protect.max_share * shape.weights
    for pattern in recipe.protect.modules:
        for name in match(pattern, list(shape.linears), "protect.modules"):
            if not shape.linears[name].fixed:
                room -= 0 if chosen[name].keep else shape.linears[name].parameters
                why = f"named by protect.modules {pattern!r}"
                chosen[name] = replace(_raised(chosen[name], recipe, why, ()), pinned=True)
    if recipe.protect.channels == "module":
        for name, why in affected(shape, sink_map):
            members = shape.linears[name].fused_with or [name]
            cost = sum(shape.linears[member].parameters for member in members)
            if chosen[name].pinned or chosen[name].keep or cost > room:
                continue
            room -= cost
            for member in members:
                chosen[member] = _raised(chosen[member], recipe, why if member == name else f"fused with {name}",
                                         tuple(sink_map.modules[name].sink_columns))
    return chosen


def affected(shape: ModelShape, sink_map: SinkMap) -> list[tuple[str, str]]:
    """The linears that sinks dominate, most affected first, each with the reason in words."""
    ranked = []
    sinks = " and ".join(repr(token.text) for token in sink_map.tokens[:2] if token.text) or "the sink position"
    for name, statistics in sink_map.modules.items():
        if name not in shape.linears or shape.linears[name].fixed or shape.linears[name].part_of:
            continue  # an expert cannot have a format of its own
        supers = [weight for weight in sink_map.super_weights if weight.module == name]
        if not supers and (not statistics.sink_columns or statistics.sink_energy < MIN_SINK_ENERGY):
            continue
        parts = []
        if born := born_here(name, shape, sink_map):
            parts.append(born)
        if statistics.sink_columns:
            parts.append(f"{sinks} sets its input range ({statistics.input_max:.3g} against "
                         f"{statistics.input_max_without_sinks:.3g} elsewhere) and gives "
                         f"{statistics.sink_energy:.0%} of trace(H)")
        if supers:
            places = ", ".join(f"[{weight.row}, {weight.column}]" for weight in supers[:NAMED])
            parts.append(f"it holds the super weight{'s' if len(supers) > 1 else ''} {places} "
                         f"(+{supers[0].loss_increase:.3g} nats without {'the first' if len(supers) > 1 else 'it'})")
        loss = sum(weight.loss_increase for weight in supers)
        ranked.append((loss + statistics.sink_energy, name, "; ".join(parts)))
    return [(name, why) for _, name, why in sorted(ranked, key=lambda item: (-item[0], item[1]))]


def check_group_sizes(choices: dict[str, Draft], shape: ModelShape) -> None:
    """Refuse groups that do not divide the input columns."""
    for name, choice in choices.items():
        columns = shape.linears[name].columns
        if choice.quantized and choice.group_size != -1 and (
                not choice.group_size or choice.group_size < 1 or columns % choice.group_size):
            scheme = scheme_of(choice.form)
            if scheme.group_size is not None:
                raise RequestError(f"{scheme.words} have blocks of {scheme.group_size}, which do not divide the "
                                   f"{columns} input columns of {name}; leave it alone (weights.ignore=['{name}']), or "
                                   "take another weights.format.")
            fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
            raise RequestError(
                f"the group size {choice.group_size} does not divide the {columns} input columns of {name}; "
                f"use {' or '.join(map(str, [*fitting, -1]))} (weights.group_size, or its override).")


def _raised(choice: Draft, recipe: Recipe, why: str, columns: tuple[int, ...]) -> Draft:
    bits = max(recipe.protect.bits, choice.bits)
    if bits > 8:
        return Draft(16, None, UNTOUCHED, f"left in 16 bits: {why}", "module", columns, why=why)
    return Draft(bits, choice.group_size, choice.method, f"{bits} bits: {why}", "module", columns, why=why)


def born_here(name: str, shape: ModelShape, sink_map: SinkMap) -> str:
    """Which massive activations this linear writes into the residual stream first, in words; empty where none."""
    linear = shape.linears[name]
    if linear.rows != sink_map.model.hidden_size or linear.reads == "stream" or linear.part_of:
        return ""
    block = f"layers.{linear.block}"
    is_attention = linear.reads == "values" or any(part in name for part in ("attn", "attention"))
    half = f"{block}.{'attention' if is_attention else 'mlp'}"
    here = [str(channel.channel) for channel in sink_map.channels if channel.born in (block, half)]
    if not here:
        return ""
    many = len(here) > 1
    return (f"the massive activation{'s' if many else ''} in channel{'s' if many else ''} {', '.join(here)} "
            f"{'are' if many else 'is'} born here")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, as `match` takes it, matches a name."""
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def match(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """The names that a pattern matches, in order.

    Args:
        pattern: a glob over the whole name ("*.down_proj"), or "re:" and a regular expression that is searched for.
        key: the recipe key that the pattern stands in, for the error.

    Raises:
        RequestError: the pattern matches nothing, or is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise RequestError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error
    found = [name for name in names if matches(pattern, name)]
    if not found:
        raise RequestError(f"{key}: the pattern {pattern!r} matches no module{_near_miss(pattern, names)}.")
    return found


def _near_miss(pattern: str, names: Sequence[str]) -> str:
    """Compare leaf with leaf, since that is where names are mistyped."""
    leaf = re.split(r"[.*]", pattern.removeprefix("re:").rstrip("$*"))[-1].strip("\\^")
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5) or difflib.get_close_matches(
        pattern, list(names), n=1, cutoff=0.3)
    return f", did you mean {close[0]!r}" if close else ""
