"""What further detectors found, in sentences that the terminal and the report share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sinkquant.artifacts.heads import HeadRole, Role
from sinkquant.artifacts.sinkmap import Emergence, ResidualSink, SinkMap


def further(sink_map: SinkMap, shown: int | None = None) -> Iterator[str]:
    """Where massive activations emerge, residual sinks, and what detectors of other packages found.

    Args:
        shown: how many of a kind are named; None for all.
    """
    if sink_map.emergence is not None:
        yield _emergence(sink_map.emergence)
    for one in sink_map.super_experts[:shown]:
        yield (f"Super expert {one.expert} of {one.experts}: its output reaches {one.output:,.0f}, that of no other "
               f"expert more than {one.null:,.0f}; without it the massive activations are gone")
    if sink_map.head_roles:
        yield from _roles(sink_map.head_roles, shown)
    if sink_map.residual_sinks:
        yield _residual(sink_map.residual_sinks, shown)
    for name, found in sink_map.extensions.items():
        yield f"{name}: {some([f'{field} {value}' for field, value in found.items()], shown)}"


def some(words: Sequence[str], shown: int | None) -> str:
    """The first of some words, and whether there are more."""
    first = words[:shown]
    return ", ".join(first).removesuffix(",") + ("" if len(first) == len(words) else ", ...")


def _emergence(one: Emergence) -> str:
    return (f"Massive activations emerge in block {one.block} ({one.place}): the norm of their tokens rises by "
            f"{one.rise:,.1f} times the median token's, to {one.norm:,.1f}; that of no other token by more than "
            f"{one.null:.1f}")


ROLES: dict[Role, str] = {"mixing": "hold mixing back", "switched": "rest unless a token wakes them",
                          "positional": "read a place", "information": "read information"}


def _roles(roles: Sequence[Sequence[HeadRole]], shown: int | None) -> Iterator[str]:
    """How many heads play each role, and what wakes those that wait."""
    counts = Counter(one.role for layer in roles for one in layer)
    yield "Heads: " + ", ".join(f"{counts[role]} {what} ({role})" for role, what in ROLES.items() if counts[role])
    waiting = [(layer, head, one) for layer, row in enumerate(roles) for head, one in enumerate(row)
               if one.role == "switched"]
    waiting.sort(key=lambda item: item[2].explained_null - item[2].explained)
    for layer, head, one in waiting[:shown]:
        after = "at" if one.condition == "token" else "after"
        yield (f"Head {head} of layer {layer} rests at {one.rests:.0%} of the tokens, but less {after} "
               f"{', '.join(map(repr, one.tokens))}: the token explains {one.explained:.0%} of that, and "
               f"{one.explained_null:.0%} where tokens are dealt out anew")
    if shown is not None and len(waiting) > shown:
        yield f"... and {len(waiting) - shown} more switched heads"


def _residual(sinks: Sequence[ResidualSink], shown: int | None) -> str:
    named = some([f"{one.channel} ({one.ratio:.1f} x the median)" for one in sinks], shown)
    what = "residual sink, a channel" if len(sinks) == 1 else "residual sinks, channels"
    return (f"{len(sinks)} {what} in which most tokens are large: {named}; no other channel passes "
            f"{sinks[0].null:.1f} x")
