"""Which tokens are sinks, wherever they stand: from the attention that positions and token ids receive.

A candidate is a position (the first one, or any other whatever stands there) or a token id (all its occurrences in a
row together, since several copies share the mass). Its score in a head is the mean mass that it receives from the
queries that come after it, in excess of what even attention would give it: (mass - even) / (1 - even). It is a sink
of a head that scores over the threshold in most of its occurrences. `sinks` asks for enough such heads: a single head
that looks at closing quotes is no sink of the model. Sinks that share their heads share the mass too: beside sinks that
are known already, the mass that these leave is what counts; among tokens that carry a massive activation, the mass of
all of them together.
The null: over five random models of each of thirteen families the largest score of any single occurrence in any head
is 0.16 (0.01 without QK-norms), where the threshold is 0.3 and half of the occurrences must pass it.
A token that makes up most of a row cannot be told from the rest of it and is never a sink: a prompt that repeats one
token has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkquant.detect.table import AttentionTable
from sinkquant.recipe import Detection

MIN_QUERIES = 16
"""A column seen by fewer queries says nothing: the last position of a row receives all of its own attention."""

MIN_LEFT = 0.25
"""Where known sinks leave less mass than this, what is left says nothing."""

LIFT = 2.0
"""What shares the mass of massive tokens receives at least this much more than even attention would give it."""

MAX_EVEN_MASS = 0.5
"""A token id that even attention would give more than this is no exception in its row."""


@dataclass(frozen=True)
class SinkCandidate:
    """A sink before it has a name. `attention`: mean mass over heads, layers and occurrences; `heads`: share of
    (occurrence, head) pairs with mass over the threshold; `share`: share of all positions that hold it; `sink_heads`:
    share of heads that it is a sink of; `rows`: number of rows that hold it; `layers`: those with such a head."""

    token_id: int | None
    position: int | None
    attention: float
    heads: float
    share: float
    sink_heads: float
    rows: int
    layers: tuple[int, ...] = ()


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""mass [rows, heads, n], even mass [.., n] -> bool [rows, heads, n]: whether it is a sink there, in one layer."""


def find_sinks(table: AttentionTable, rows: torch.Tensor, settings: Detection, known: torch.Tensor | None = None,
               carriers: torch.Tensor | None = None) -> list[SinkCandidate]:
    """What is a sink of at least one head in these rows, strongest first.

    Args:
        rows: int64 [rows, length], the rows that `table` was made from.
        known: bool [rows, length], positions of sinks that are known already; scores are taken of the mass they leave.
        carriers: bool [rows, length], positions that share a sink's mass: they pass the threshold together, and each
            by itself receives LIFT times what even attention would give it.
    """
    places, table = table.attending, table.of_heads()
    if carriers is not None:
        rules = [_among(carriers, layer.received, layer.uniform, settings) for layer in table.layers]
    else:
        rules = [_beside(known, layer.received, settings) for layer in table.layers]
    positions = _position_sinks(table, rows, settings, rules, places)
    taken = {candidate.position for candidate in positions if candidate.position is not None}
    found = positions + _token_sinks(table, rows, settings, taken, rules, places)
    return sorted(found, key=lambda candidate: -candidate.attention)


def group_mass(received: torch.Tensor, visible: torch.Tensor, uniform: torch.Tensor,
               first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass received by all copies of a token together, written at the place of its first copy.

    Args:
        received: [rows, heads, length]; visible, uniform: [length].
        first: int64 [rows, length], for every position the first position of the same group in its row, or -1.

    Returns:
        mass [rows, heads, length] and even mass [rows, length]: means over the queries that see the group, 0 where
        no group starts.
    """
    rows, heads, length = received.shape
    inside = first >= 0
    index = first.clamp(min=0)
    mass = torch.zeros_like(received).scatter_add_(
        2, index[:, None].expand(rows, heads, length), received * inside[:, None])
    even = torch.zeros(rows, length).scatter_add_(1, index, uniform.expand(rows, length) * inside)
    seen = torch.zeros(rows, length).scatter_add_(1, index, visible.float().expand(rows, length) * inside)
    queries = torch.minimum(seen, float(length) - torch.arange(length).float()).clamp(min=1)
    return mass / queries[:, None], even / queries


def first_occurrences(rows: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """For every position the first position in its row with the same id; -1 at position 0 and at taken positions."""
    length = rows.shape[1]
    usable = torch.tensor([p != 0 and p not in taken for p in range(length)])
    # A stable sort brings equal ids together, the first of them in front.
    ids, order = torch.where(usable, rows, -1).sort(dim=1, stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    heads = torch.where(starts, torch.arange(length), 0).cummax(dim=1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, heads))
    return torch.where(usable, first, -1)


def _beside(known: torch.Tensor | None, received: torch.Tensor, settings: Detection) -> Rule:
    """Over the threshold, of the mass that known sinks leave; never where they leave too little to judge by."""
    left = torch.ones(1) if known is None else 1 - _together(known, received)
    left = torch.where(left >= MIN_LEFT, left, torch.inf)
    return lambda mass, even: _excess(mass, even) / left > settings.threshold


def _among(carriers: torch.Tensor, received: torch.Tensor, uniform: torch.Tensor, settings: Detection) -> Rule:
    """Over the threshold together, and each far over even attention."""
    even_together = _together(carriers, uniform.expand(len(carriers), 1, -1))
    joint = _excess(_together(carriers, received), even_together) > settings.threshold
    return lambda mass, even: joint & (mass > LIFT * even) & (even <= MAX_EVEN_MASS)


def _together(marked: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """[rows, heads, 1], mean mass on the marked positions by the queries from the first of them on."""
    queries = marked.shape[1] - marked.float().argmax(dim=1)
    return ((received * marked[:, None]).sum(-1) / queries[:, None])[:, :, None]


def _excess(mass: torch.Tensor, even: torch.Tensor) -> torch.Tensor:
    """(mass - even) / (1 - even), 0 where even attention already gives much."""
    return torch.where(even <= MAX_EVEN_MASS, (mass - even) / (1 - even).clamp(min=0.5), torch.zeros_like(mass))


def _sink_heads(share: list[torch.Tensor], settings: Detection) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of heads that every candidate is a sink of, and bool [layers, candidates], whether a layer has any.
    `share`: of every layer, [heads, candidates] of occurrences over."""
    over = [layer >= settings.occurrence_share for layer in share]
    return torch.cat(over).float().mean(0), torch.stack([layer.any(0) for layer in over])


def _layers(marked: torch.Tensor, places: list[int]) -> tuple[int, ...]:
    return tuple(places[entry] for entry in marked.nonzero().flatten().tolist())


def _position_sinks(table: AttentionTable, rows: torch.Tensor, settings: Detection,
                    rules: list[Rule], places: list[int]) -> list[SinkCandidate]:
    length = rows.shape[1]
    last = max(length - MIN_QUERIES, 1)
    share, score, over = [], [], []
    for layer, rule in zip(table.layers, rules, strict=True):
        mass = layer.mass
        event = rule(mass, layer.uniform / layer.visible.clamp(min=1))
        share.append(event.float().mean(0)[:, :last])
        score.append(mass.mean(dim=(0, 1))[:last])
        over.append((mass > settings.threshold).float().mean(dim=(0, 1))[:last])
    sink_heads, layers = _sink_heads(share, settings)
    attention, heads = torch.stack(score).mean(0), torch.stack(over).mean(0)
    found = []
    for position in torch.nonzero(sink_heads).flatten().tolist():
        ids, counts = rows[:, position].unique(return_counts=True)
        always_one_id = len(ids) == 1
        # A position other than the first must hold different ids, else the id may be what attracts.
        if position > 0 and (len(rows) < 2 or float(counts.max()) / len(rows) > 0.5):
            continue
        found.append(SinkCandidate(int(ids[0]) if always_one_id else None, position,
                               float(attention[position]), float(heads[position]), 1 / length,
                               float(sink_heads[position]), len(rows), _layers(layers[:, position], places)))
    return found


def _token_sinks(table: AttentionTable, rows: torch.Tensor, settings: Detection, taken: set[int],
                 rules: list[Rule], places: list[int]) -> list[SinkCandidate]:
    length = rows.shape[1]
    first = first_occurrences(rows, taken)
    place = torch.arange(length)
    starts = (first == place) & (place <= length - MIN_QUERIES)
    ids, inverse = rows[starts].unique(return_inverse=True)
    if len(ids) == 0:
        return []
    counts = torch.bincount(inverse, minlength=len(ids)).float()
    share, score, over = [], [], []
    for layer, rule in zip(table.layers, rules, strict=True):
        mass, even = group_mass(layer.received, layer.visible, layer.uniform, first)
        event = rule(mass, even[:, None])
        at_starts = [tensor.transpose(1, 2)[starts].float() for tensor in (event, mass, mass > settings.threshold)]
        means = [torch.zeros(len(ids), values.shape[1]).index_add_(0, inverse, values) / counts[:, None]
                 for values in at_starts]
        share.append(means[0].T)
        score.append(means[1].mean(1))
        over.append(means[2].mean(1))
    sink_heads, layers = _sink_heads(share, settings)
    attention, heads = torch.stack(score).mean(0), torch.stack(over).mean(0)
    return [SinkCandidate(int(ids[i]), None, float(attention[i]), float(heads[i]),
                          float((rows == ids[i]).float().mean()), float(sink_heads[i]), int(counts[i]),
                          _layers(layers[:, i], places))
            for i in torch.nonzero(sink_heads).flatten().tolist()]
