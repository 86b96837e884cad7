"""What detection found, on one screen: the strongest of each kind, how many there are, and what it means."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import Channel, SinkMap, SinkToken
from sinkquant.artifacts.experts import in_lines
from sinkquant.artifacts.findings import further, some

SHOWN = 4
"""Of each kind, before the rest is counted."""
LARGEST_FLOAT16 = 65504.0


def facts(sink_map: SinkMap) -> Iterator[str]:
    """What was looked at."""
    model, told = sink_map.model, sink_map.tokenization
    yield f"{model.name}: {model.architecture}, {model.layers} layers of {model.heads} heads"
    yield f"Tokenizer adds <bos> {told.adds_bos}; rows start with it: {told.rows_start_with_bos}"
    rate = ", ".join(f"{value:.3f} at {threshold}" for threshold, value in sink_map.sink_rate.items())
    repeated = ", ".join(f"{value:.3f}" for value in sink_map.sink_rate_repeated_token.values())
    yield f"Sink rate at T = {told.length}: {rate}; one token repeated: {repeated}"


def token_table(sink_map: SinkMap, full: bool) -> Table | None:
    """The sinks, the strongest first; None where there is none."""
    if not sink_map.tokens:
        return None
    shown = Table("token", "id", "position", "kind", "attention", "heads", "massive", "because of",
                  title="Sink tokens", title_justify="left")
    for token in _strongest(sink_map)[:None if full else SHOWN]:
        shown.add_row(*("any" if one is None else escape(repr(one)) for one in (token.text, token.token_id,
                                                                                 token.position)),
                      token.kind, f"{token.attention:.3f}", f"{token.heads:.3f}", "yes" if token.massive else "no",
                      ", ".join(token.criteria))
    return shown


def findings(sink_map: SinkMap, full: bool) -> Iterator[str]:
    """Everything else, a paragraph each."""
    if sink_map.verdict is not None:
        yield f"{sink_map.verdict.sentence} Why: {sink_map.verdict.reason}."
    elif not sink_map.tokens:
        yield "No sink token was found."
    yield from _rest(len(sink_map.tokens), "sink tokens", full)
    if sink_map.secondary:
        count = len(sink_map.secondary)
        yield (f"{count} secondary sink{'s' if count > 1 else ''}, in some places only: "
               f"{some([_label(token) for token in sink_map.secondary], None if full else SHOWN)}")
    channels = sorted(sink_map.channels, key=lambda channel: -channel.peak)
    for channel in channels[:None if full else SHOWN]:
        yield _channel(channel)
    yield from _rest(len(channels), "massive channels", full)
    if sink_map.outlier_channels:
        yield (f"{len(sink_map.outlier_channels)} outlier channels, large for many tokens: "
               f"{some([str(one.channel) for one in sink_map.outlier_channels], None if full else SHOWN)}")
    weights = sorted(sink_map.super_weights, key=lambda weight: -weight.loss_increase)
    for weight in weights[:None if full else SHOWN]:
        yield (f"Super weight {weight.module}[{weight.row}, {weight.column}] = {weight.value:.4g}: "
               f"+{weight.loss_increase:.3g} nats without it")
    yield from _rest(len(weights), "super weights", full)
    experts = in_lines(sink_map)
    yield from experts[:None if full else SHOWN]
    yield from _rest(len(experts), "layers of experts", full)
    yield f"{sum(head.no_op for layer in sink_map.heads for head in layer)} no-op heads, {len(weights)} super weights"
    yield from further(sink_map, None if full else SHOWN)
    for what, null in sink_map.nulls.items() if full else ():
        yield f"Null of {what}: {null}"
    for note in sink_map.notes:
        yield f"Note: {note}"


def meaning(sink_map: SinkMap) -> str:
    """What follows for quantizing this model."""
    if not sink_map.tokens and not sink_map.channels:
        return ("This model has no attention sinks and no massive activations: protection has nothing to keep, so "
                "quantize it as any other and expect the control to do as well.")
    parts = []
    if sink_map.tokens:
        first = _strongest(sink_map)[0]
        parts.append(f"{_label(first)} takes {first.attention:.0%} of all attention, and {first.heads:.0%} of the "
                     "heads rest on it: keep it exact in a KV cache of few bits, and let it weigh in the Hessians")
    peak = max((channel.peak for channel in sink_map.channels), default=0.0)
    if peak:
        parts.append(f"activations reach {peak:,.0f}: where they are rounded, take a scale per token, not one that is "
                     "stored")
    if peak > LARGEST_FLOAT16:
        parts.append("that is more than float16 holds: compute in bfloat16 or float32")
    if sink_map.super_weights:
        worst = max(weight.loss_increase for weight in sink_map.super_weights)
        parts.append(f"single weights are worth up to {worst:.2g} nats: pruning must spare them, and a scale per "
                     "channel may round them away")
    return f"For this model: {'; '.join(parts)}."


def _strongest(sink_map: SinkMap) -> list[SinkToken]:
    return sorted(sink_map.tokens, key=lambda token: -token.attention)


def _label(token: SinkToken) -> str:
    if token.kind == "learned":
        return "the learned sink"
    if token.text is None or token.kind == "first_position":
        return f"position {token.position}, whatever stands there,"
    return f"{token.text!r}{'' if token.position is None else f' at position {token.position}'}"


def _channel(channel: Channel) -> str:
    carried = ", ".join(map(repr, channel.tokens[:SHOWN])) + ("" if len(channel.tokens) <= SHOWN else ", ...")
    return (f"Channel {channel.channel}: peak {channel.peak:.1f}, {channel.ratio:.1f} x the median, born in "
            f"{channel.born}, ended {channel.ended or 'never'}, carried by {carried}")


def _rest(count: int, what: str, full: bool) -> Iterator[str]:
    if not full and count > SHOWN:
        yield f"... and {count - SHOWN} more {what}; --full shows all"
