"""The engine table in words."""

from __future__ import annotations

from sinkquant.schemes.loads import KV_SCALES, READ_KV_SCALES, Loads
from sinkquant.schemes.registry import SCHEMES

HEAD = ("| weights | engine | formats | hardware | known | to know |", "|---|---|---|---|---|---|")


def engine_table() -> list[str]:
    """Markdown lines: a row for every scheme and engine; schemes that the same engines load share theirs."""
    rows: dict[Loads, list[str]] = {}
    for said, loads in (*((scheme.words, scheme.loads) for scheme in SCHEMES), (KV_SCALES, READ_KV_SCALES)):
        for row in loads:
            words = rows.setdefault(row, [])
            words += [said] if said not in words else []
    return [*HEAD, *(f"| {', '.join(words)} | {_engine(row)} | {row.conditions() or 'all'} | {row.hardware} | "
                     f"{row.known}: {row.place} | {row.caveat} |" for row, words in rows.items())]


def instructions_asked() -> list[str]:
    """What engines' kernels ask of a processor, in the order of the table."""
    return list(dict.fromkeys(row.instructions for scheme in SCHEMES for row in scheme.loads if row.instructions))


def out_of_reach(has: frozenset[str]) -> list[str]:
    """What engines take of a processor and this one does not have, one sentence a row.

    Args:
        has: the instructions that it has, as `Loads.instructions` names them.
    """
    return [f"{_engine(row)} needs {row.instructions} for {scheme.words} ({row.conditions()}), which this processor "
            f"lacks: {row.caveat}"
            for scheme in SCHEMES for row in scheme.loads if row.instructions and row.instructions not in has]


def _engine(row: Loads) -> str:
    return f"{row.engine} {row.since}".strip()
