"""Many module names in few words: "layers 0-29: self_attn q/k/v_proj, mlp down_proj"."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

RANGES = 8
"""Ranges of layers that are named before the rest is counted."""


def in_words(names: Collection[str], among: Iterable[str]) -> list[str]:
    """One phrase for every set of layers, those with most modules first.

    Args:
        names: module names. among: all names of the model, which tell whether all experts of a layer are meant.
    """
    parts: dict[str, dict[int, int]] = {}
    for name in names:
        kind, layer = _split(name)
        counts = parts.setdefault(kind, {})
        counts[layer] = counts.get(layer, 0) + 1
    whole: dict[tuple[str, int], int] = {}
    for name in among:
        whole[_split(name)] = whole.get(_split(name), 0) + 1
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for kind, counts in parts.items():
        some = [(count, whole[kind, layer]) for layer, count in counts.items() if count < whole[kind, layer]]
        share = f" ({_span([count for count, _ in some])} of {_span([total for _, total in some])})" if some else ""
        by_layers.setdefault(tuple(sorted(counts)), []).append(kind + share)
    return [f"{_layers(layers)}{': ' if layers != (-1,) else ''}{', '.join(_joined(kinds))}"
            for layers, kinds in sorted(by_layers.items(), key=lambda item: (-len(item[0]) * len(item[1]), item[0]))]


def in_few_words(names: Collection[str], among: Iterable[str], most: int) -> list[str]:
    """The same, the sets of layers with most modules only, and how many there are of the rest."""
    phrases = in_words(names, among)
    if len(phrases) <= most:
        return phrases
    return [*phrases[:most], f"and {len(phrases) - most} other sets of layers"]


def _split(name: str) -> tuple[str, int]:
    """What a module is in its layer, experts not told apart; and the layer, -1 outside all."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return name, -1
    return ".".join("*" if part.isdecimal() else part for part in parts[place + 1:]), int(parts[place])


def _joined(kinds: Sequence[str]) -> list[str]:
    """Siblings in one word: "self_attn q/k/v_proj"."""
    found = []
    for parent, members in itertools.groupby(kinds, lambda kind: kind.rpartition(".")[0]):
        leaves = [member.rpartition(".")[2] for member in members]
        end = leaves[0][leaves[0].rfind("_"):] if "_" in leaves[0] else ""
        if len(leaves) > 1 and end and all(leaf.endswith(end) for leaf in leaves):
            leaves = [leaf.removesuffix(end) for leaf in leaves]
            leaves[-1] += end
        found.append(f"{parent} {'/'.join(leaves)}".strip())
    return found


def _layers(layers: Sequence[int]) -> str:
    if tuple(layers) == (-1,):
        return ""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:RANGES]]
    more = sum(b - a + 1 for a, b in ranges[RANGES:])
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(words)}{f' and {more} more' if more else ''}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
