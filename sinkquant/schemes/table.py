"""What the engine table asks of a processor."""

from __future__ import annotations

from sinkquant.schemes.registry import SCHEMES


def instructions_asked() -> list[str]:
    """What engines' kernels ask of a processor, in the order of the table."""
    return list(dict.fromkeys(row.instructions for scheme in SCHEMES for row in scheme.loads if row.instructions))


def out_of_reach(has: frozenset[str]) -> list[str]:
    """What engines take of a processor and this one does not have, one sentence a row.

    Args:
        has: the instructions that it has, as `Loads.instructions` names them.
    """
    return [f"{f'{row.engine} {row.since}'.strip()} needs {row.instructions} for {scheme.words} ({row.conditions()}), "
            f"which this processor lacks: {row.caveat}"
            for scheme in SCHEMES for row in scheme.loads if row.instructions and row.instructions not in has]
