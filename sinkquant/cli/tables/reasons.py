"""Reasons that differ in their numbers only, as one reason with ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")

NAMED = 4
"""Of channels, which are names and no amounts, so many are listed."""


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
    named = [parts[0][:found.start()].endswith("channel ") for found in NUMBER.finditer(parts[0])]
    slots = iter([_list(column) if name else _range(column)
                  for name, column in zip(named, zip(*numbers, strict=True), strict=True)])
    return NUMBER.sub(lambda _: next(slots), parts[0])


def _range(values: Sequence[str]) -> str:
    ordered = sorted(set(values), key=lambda value: float(value.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _list(values: Sequence[str]) -> str:
    ordered = sorted(set(values), key=int)
    return ", ".join(ordered[:NAMED]) + (", ..." if len(ordered) > NAMED else "")
