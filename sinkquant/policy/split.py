"""The rule of `protect.channels: split`: which input columns and single weights stand beside the codes in 16 bits."""

from __future__ import annotations

from dataclasses import replace

from sinkquant.artifacts import ModelShape, SinkMap
from sinkquant.errors import RequestError
from sinkquant.policy.carried import scheme_for
from sinkquant.policy.rules import Draft, affected
from sinkquant.recipe import Recipe

NAMED = 6
"""A reason lists no more columns than that."""
NO_BACKEND = ("protect.channels 'split' and Conv1D take sinkquant's own format, which no other backend holds; leave "
              "backend at compressed-tensors.")
NO_INPUTS = ("protect.channels 'split' and Conv1D take sinkquant's own format, which holds integer weights and leaves "
             "inputs in 16 bits; leave the section activations out.")
NO_EXPERTS = ("protect.channels 'split' takes sinkquant's own format, which holds no packed experts; set "
              "weights.ignore=['*.experts.*'], or another protect.channels.")


def check_split(recipe: Recipe) -> None:
    """Refuse what does not go with columns beside the codes, whatever the sinks are.

    Raises:
        RequestError: the recipe prunes, rotates, rounds inputs or is for another backend as well.
    """
    if recipe.protect.channels != "split":
        return
    if recipe.weights.rotate != "none":
        raise RequestError("protect.channels 'split' keeps the columns that were found, and weights.rotate mixes them "
                           "with the others; choose one of the two.")
    if recipe.prune.zeros:
        raise RequestError("protect.channels 'split' keeps whole columns, and the section prune sets weights in them "
                           "to zero; choose one of the two.")
    if not scheme_for(recipe).beside:
        raise RequestError(NO_BACKEND)
    if recipe.activations.format != "16-bit":
        raise RequestError(NO_INPUTS)


def split_channels(choices: dict[str, Draft], shape: ModelShape, sink_map: SinkMap,
                   recipe: Recipe) -> dict[str, Draft]:
    """Take the columns in which a sink sets the input range, and super weights, out of the groups of every linear that
    the sinks dominate, the most affected first, up to `max_share` of all weights of the linears.

    Modules that engines fuse read one input and share its columns; there a super weight takes its whole column along.

    Raises:
        RequestError: as `check_split`, or packed experts are to be quantized as well.
    """
    if recipe.protect.channels != "split":
        return choices
    check_split(recipe)
    if any(choice.quantized and shape.linears[name].part_of for name, choice in choices.items()):
        raise RequestError(NO_EXPERTS)
    chosen = dict(choices)
    named = sum(shape.linears[name].parameters for name, choice in choices.items() if choice.keep)
    room = recipe.protect.max_share * shape.weights - named
    for name, why in affected(shape, sink_map):
        members = shape.linears[name].fused_with or [name]
        supers = {(weight.row, weight.column) for weight in sink_map.super_weights if weight.module == name}
        columns = set(sink_map.modules[name].sink_columns)
        if len(members) > 1:
            columns |= {column for _, column in supers}
        scalars = sorted(place for place in supers if place[1] not in columns)
        cost = len(scalars) + len(columns) * sum(shape.linears[member].rows for member in members)
        free = all(chosen[m].quantized and not chosen[m].pinned and not chosen[m].keep for m in members)
        if not free or cost > room:
            continue
        room -= cost
        for member in members:
            chosen[member] = _split(chosen[member], sorted(columns), scalars,
                                    why if member == name else f"fused with {name}")
    return chosen


def _split(choice: Draft, columns: list[int], scalars: list[tuple[int, int]], why: str) -> Draft:
    parts = []
    if columns:
        some = ", ".join(map(str, columns[:NAMED])) + (", ..." if len(columns) > NAMED else "")
        parts.append(f"{len(columns)} input column{'s' if len(columns) > 1 else ''} ({some})")
    if scalars:
        parts.append(f"{len(scalars)} single weight{'s' if len(scalars) > 1 else ''}")
    beside = f"{' and '.join(parts)} in 16 bits beside the codes: {why}"
    return replace(choice, reason=f"{choice.bits} bits, {beside}", keep="split", columns=tuple(columns),
                   scalars=tuple(scalars), why=beside)
