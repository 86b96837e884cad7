"""Spending bytes: raise formats until a size is reached, in a given order."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from sinkquant.artifacts import LinearShape, ModelShape
from sinkquant.artifacts.sizes import module_bytes
from sinkquant.methods import UNTOUCHED
from sinkquant.policy.carried import more_precise
from sinkquant.policy.engines import ANY, engine_loads
from sinkquant.policy.rules import Draft
from sinkquant.policy.sharing import moves_together
from sinkquant.schemes import scheme_of

SMALLEST_GROUP = 32


def linear_bytes(shape: ModelShape, choices: dict[str, Draft]) -> int:
    """Bytes of all linears of the blocks, scales counted."""
    return sum(choice_bytes(shape, name, choice) for name, choice in choices.items())


def choice_bytes(shape: ModelShape, name: str, choice: Draft) -> int:
    """Bytes of one linear, scales counted."""
    return module_bytes(shape, name, choice.form)


def fill(choices: dict[str, Draft], shape: ModelShape, spare: int, order: Sequence[str], why: str,
         engine: str = ANY) -> dict[str, Draft]:
    """Spend at most `spare` bytes: one more bit wherever it fits, in `order`, again and again; what is left on groups
    of half the size, and then on 16 bits instead of 8. Modules that engines fuse are raised together; pinned ones are
    not touched.

    Args:
        order: module names, first served first.
        why: ends the reason of every raised module.
        engine: raise to nothing that it does not run.
    """
    def run(raised: Draft | None, linear: LinearShape) -> Draft | None:
        return raised if raised is not None and engine_loads(engine, raised.form, linear) else None

    def more_bits(choice: Draft, linear: LinearShape) -> Draft | None:
        return run(more_precise(choice, linear.columns), linear)

    def smaller_groups(choice: Draft, linear: LinearShape) -> Draft | None:
        return run(_half_the_group(choice, linear.columns), linear)

    def left_alone(choice: Draft, linear: LinearShape) -> Draft | None:
        return _left_alone(choice) if more_bits(choice, linear) is None else None

    chosen = dict(choices)
    for raise_format in (more_bits, smaller_groups, left_alone):
        progress = True
        while progress:
            progress = False
            for name in order:
                raised = _raise_together(name, chosen, shape, raise_format)
                cost = sum(choice_bytes(shape, m, c) - choice_bytes(shape, m, chosen[m]) for m, c in raised.items())
                if 0 < cost <= spare:
                    spare -= cost
                    progress = True
                    chosen |= {m: replace(c, reason=_reason(c, why)) for m, c in raised.items()}
    return chosen


def close_gap(choices: dict[str, Draft], floor: dict[str, Draft], shape: ModelShape, spare: int,
              why: str) -> dict[str, Draft]:
    """Spend bytes that `fill` could not: of all pairs of changes, one up and one down or both up, make the one that
    comes closest to `spare` from below, and again from there.

    Args:
        floor: no module is brought below its format here.
    """
    chosen = dict(choices)
    while spare > 0:
        moves = _moves(chosen, floor, shape)
        costs = [cost for cost, _, _ in moves]
        best = 0
        changes: dict[str, Draft] = {}
        for cost, name, changed in moves:
            other = bisect.bisect_right(costs, spare - cost) - 1
            while other >= 0 and moves[other][1] == name and name:
                other -= 1
            if other >= 0 and cost + costs[other] > best:
                best, changes = cost + costs[other], changed | moves[other][2]
        if not changes:
            break
        chosen |= {member: replace(choice, reason=_reason(choice, why)) for member, choice in changes.items()}
        spare -= best
    return chosen


def _moves(choices: dict[str, Draft], floor: dict[str, Draft],
           shape: ModelShape) -> list[tuple[int, str, dict[str, Draft]]]:
    """Every change of one module, or of those that engines fuse: (bytes it costs, its name, new formats), cheapest
    first; no change at all is one of them."""
    moves: list[tuple[int, str, dict[str, Draft]]] = [(0, "", {})]
    for name in choices:
        members = moves_together(name, choices, shape)
        if members and all(floor[m].quantized and not floor[m].pinned for m in members):
            for option in _formats(floor[name], shape.linears[name].columns):
                changed = {m: replace(option, method=floor[m].method if option.quantized else option.method)
                           for m in members}
                cost = sum(choice_bytes(shape, m, c) - choice_bytes(shape, m, choices[m]) for m, c in changed.items())
                if cost:
                    moves.append((cost, name, changed))
    return sorted(moves, key=lambda move: (move[0], move[1]))


def _formats(choice: Draft, columns: int) -> list[Draft]:
    """A format and every more precise one."""
    sizes = [choice]
    while (smaller := _half_the_group(sizes[-1], columns)) is not None:
        sizes.append(smaller)
    found: list[Draft] = []
    for size in sizes:
        higher: Draft | None = size
        while higher is not None:
            found.append(higher)
            higher = more_precise(higher, columns)
    return [*found, replace(choice, bits=16, group_size=None, method=UNTOUCHED)]


def _reason(choice: Draft, why: str) -> str:
    grain = "one scale per channel" if choice.group_size == -1 else f"groups of {choice.group_size}"
    reason = f"{choice.bits} bits, {grain}: {why}" if choice.quantized else f"left in 16 bits: {why}"
    return f"{reason}; {choice.why}" if choice.keep else reason


def _raise_together(name: str, choices: dict[str, Draft], shape: ModelShape,
                    raise_format: Callable[[Draft, LinearShape], Draft | None]) -> dict[str, Draft]:
    """The raised formats of a module and those fused with it; empty where one of them cannot be raised, or where
    another member of the group speaks for it."""
    members = moves_together(name, choices, shape)
    raised: dict[str, Draft] = {}
    for member in members:
        choice = choices[member]
        higher = None if choice.pinned or not choice.quantized else raise_format(choice, shape.linears[member])
        if higher is None:
            return {}
        raised[member] = higher
    return raised


def evenly_spread(names: Sequence[str]) -> list[str]:
    """An order that knows nothing of sinks and favours no depth: van der Corput's sequence over the positions."""
    def radical_inverse(index: int) -> float:
        value, base = 0.0, 0.5
        while index:
            value, index, base = value + base * (index & 1), index >> 1, base / 2
        return value

    return [names[i] for i in sorted(range(len(names)), key=radical_inverse)]


def _half_the_group(choice: Draft, columns: int) -> Draft | None:
    size = columns if choice.group_size == -1 else choice.group_size
    if not scheme_of(choice.form).any_group:
        return None
    if size is None or size % 2 or size // 2 < SMALLEST_GROUP or columns % (size // 2):
        return None
    return replace(choice, group_size=size // 2)


def _left_alone(choice: Draft) -> Draft:
    alone = replace(choice, bits=16, group_size=None, method=UNTOUCHED, scalars=())
    return replace(alone, keep=None, columns=()) if choice.keep == "split" else alone
