"""A plan on one screen: what is done to which linears, and why; or every linear by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.artifacts.blocks import BlockPlan
from sinkquant.cli.tables.names import in_few_words
from sinkquant.schemes import scheme_of

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
CHANNELS = re.compile(r"channels? (?:\d+, )*$")
"""What stands before the number of a channel."""
NAMED = 4
"""Of channels, which are names and no amounts, so many are listed."""
SHOWN, EXCEPTIONS = 6, 3
"""Different decisions, and places and exceptions of one, that are shown before the rest is counted."""


def plan_lines(made: Plan, full: bool = False) -> Iterator[tuple[int, str]]:
    """Indentation and text of every paragraph. `full`: a paragraph for every linear."""
    yield 0, f"{len(made.modules)} linears, {made.bits_per_weight:.3f} bits per weight"
    yield from _every(made) if full else _grouped(made)
    yield 0, (f"{made.weight_bytes:,} bytes of {made.unquantized_bytes:,}, {made.bits_per_parameter:.3f} bits per "
              f"parameter; loads in {', '.join(made.loads_in)}")
    if "kl" in made.predicted:
        ends = f", {made.predicted['kl_ends']:.2g} by head and embedding" if "kl_ends" in made.predicted else ""
        yield 0, (f"Predicted KL divergence {made.predicted['kl']:.4g} nats per token, of which "
                  f"{made.predicted['kl_sinks']:.2g} through sinks{ends}")
    if full and made.blocks is not None:
        yield from _blocks(made.blocks)
    if made.kv_cache is not None:
        yield 0, made.kv_cache.in_words()
    for note in made.notes:
        yield 0, f"Note: {note}"


def _blocks(chosen: BlockPlan) -> Iterator[tuple[int, str]]:
    """What every block of the whole model costs, and why some were dropped."""
    why = {one.block: one.reason for one in chosen.dropped}
    for cost in chosen.costs:
        measured = "" if cost.divergence is None else (f"{cost.divergence:.3g} nats without it alone, "
                                                       f"{cost.sink_share:.0%} at first positions and sinks; ")
        massive = f"; massive activations {cost.massive} in it" if cost.massive else ""
        yield 1, f"block {cost.block}: {measured}influence {cost.influence:.3g}{massive}"
        if cost.block in why:
            yield 3, f"dropped: {why[cost.block]}"


def decision_in_words(one: ModuleDecision) -> str:
    """What is done to a linear: "3 bits, group 64, GPTQ"."""
    groups = "" if one.group_size is None else "per channel" if one.group_size == -1 else f"group {one.group_size}"
    kept = {"module": "kept at higher precision", "scale": "sink columns scaled",
            "split": "sink columns beside the codes", None: ""}[one.keep]
    pruned = "" if one.prune is None else f"{one.prune.sparsity:.0%} pruned ({one.prune.pattern}) by {one.prune.method}"
    inputs = "" if one.activations == "16-bit" or one.bits == 16 else f"inputs {one.inputs_in_words()}"
    number = f"{one.bits} bits{f' ({scheme_of(one.form).words})' if one.form.floating else ''}"
    method = "" if one.method == "none" else one.method.upper()
    return ", ".join(word for word in (number, groups, method, inputs, kept, pruned) if word)


def _every(made: Plan) -> Iterator[tuple[int, str]]:
    for name, one in made.modules.items():
        yield 1, f"{name}: {decision_in_words(one)}"
        yield 3, one.reason


def _grouped(made: Plan) -> Iterator[tuple[int, str]]:
    groups: dict[str, list[str]] = {}
    for name, one in made.modules.items():
        groups.setdefault(decision_in_words(one), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    for words, names in ordered[:SHOWN]:
        yield 1, f"{words}: {_count(names)}"
        reasons = alike({name: made.modules[name].reason for name in names})
        common = [part for part in next(iter(reasons)) if all(part in parts for parts in reasons)]
        yield from ((2, phrase) for phrase in in_few_words(names, made.modules, EXCEPTIONS))
        if common:
            yield 2, _said(made, names, common)
        yield from _exceptions(made, {parts: some for parts, some in reasons.items() if [*parts] != common}, common)
    if rest := ordered[SHOWN:]:
        yield 1, (f"and {len(rest)} other decisions for {_count([name for _, names in rest for name in names])}; "
                  "--full shows every linear")


def _exceptions(made: Plan, reasons: dict[tuple[str, ...], list[str]], common: Sequence[str]) -> Iterator[
        tuple[int, str]]:
    """The linears that have more to say than those of the same decision."""
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[0]), -len(item[1])))
    for parts, names in ordered[:EXCEPTIONS]:
        yield 2, f"{'; '.join(in_few_words(names, made.modules, 2))} ({_count(names)})"
        yield 3, _said(made, names, [part for part in parts if part not in common])
    if rest := ordered[EXCEPTIONS:]:
        yield 2, f"{_count([name for _, names in rest for name in names])} for {len(rest)} other reasons"


def _said(made: Plan, names: Sequence[str], parts: Sequence[str]) -> str:
    """What these parts of the reasons say, with the range of every number."""
    said = []
    for part in parts:
        texts = [text for name in names for text in made.modules[name].reason.split("; ") if template(text) == part]
        said.append(with_ranges(texts))
    return "; ".join(said)


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} linear{'s' if len(names) != 1 else ''}"


def alike(reasons: Mapping[str, str]) -> dict[tuple[str, ...], list[str]]:
    """The parts of a reason, numbers left out -> the modules whose reason has these parts.

    Args:
        reasons: module name -> its reason, whose parts semicolons separate.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(tuple(template(part) for part in reason.split("; ")), []).append(name)
    return found


def template(part: str) -> str:
    """What is left of a sentence without its numbers, and without those in names of modules."""
    return NUMBER.sub("#", LAYER.sub("*", part))


def with_ranges(parts: Sequence[str]) -> str:
    """One sentence for several that are alike: "range 22.4 to 3.05e+03, channel 163, 400"."""
    if len({tuple(LAYER.findall(part)) for part in parts}) > 1:
        parts = [LAYER.sub("*", part) for part in parts]
    numbers = [NUMBER.findall(part) for part in parts]
    named = [CHANNELS.search(parts[0], 0, found.start()) is not None for found in NUMBER.finditer(parts[0])]
    slots = iter([_list(column) if name else _range(column)
                  for name, column in zip(named, zip(*numbers, strict=True), strict=True)])
    return NUMBER.sub(lambda _: next(slots), parts[0])


def _range(values: Sequence[str]) -> str:
    ordered = sorted(set(values), key=lambda value: float(value.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _list(values: Sequence[str]) -> str:
    ordered = sorted(set(values), key=int)
    return ", ".join(ordered[:NAMED]) + (", ..." if len(ordered) > NAMED else "")
