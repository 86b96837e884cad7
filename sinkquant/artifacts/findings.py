"""What further detectors found, in sentences that the terminal and the report share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sinkquant.artifacts.sinkmap import Emergence, ResidualSink, SinkMap


def further(sink_map: SinkMap, shown: int | None = None) -> Iterator[str]:
    """Where massive activations emerge, residual sinks, and what detectors of other packages found.

    Args:
        shown: how many of a kind are named; None for all.
    """
    if sink_map.emergence is not None:
        yield _emergence(sink_map.emergence)
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


def _residual(sinks: Sequence[ResidualSink], shown: int | None) -> str:
    named = some([f"{one.channel} ({one.ratio:.1f} x the median)" for one in sinks], shown)
    return (f"{len(sinks)} residual sinks, channels in which most tokens are large: {named}; no other channel passes "
            f"{sinks[0].null:.1f} x")
