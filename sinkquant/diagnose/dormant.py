"""Values and dormant heads: which tokens have small values, which heads rest on the sinks, what wakes them.

Barbero et al. (2504.02732) found a head of Gemma-7B that rests on `<bos>`, whose value is small, unless the
token before is an apostrophe, whose value is large. Here the same is looked for in every head: classes of queries, "the
token is x" and "the token follows x", under which it attends elsewhere.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts.diagnosis import DormantHead, Switch, TokenValue
from sinkquant.diagnose.survey import RowSurvey

ON = 0.5
"""A head is on for a query that gives the sinks less than this share of its attention."""
DORMANT = 0.7
"""A head is dormant if it is on for less than 1 - DORMANT of the queries."""
MIN_COUNT = 5
"""A class of fewer queries says nothing."""
SHOWN = 3
TOKENS_SHOWN = 12
PLACE = -1
"""Stands for the id of a token at a sink that is a position."""
EARLY = 4
"""The first queries of a row see little but the sink and are left out."""


def token_values(found: RowSurvey, tokenizer: PreTrainedTokenizerBase) -> list[TokenValue]:
    """Value norms by token id, relative to the median of their layer and head: the smallest, the largest, the sinks."""
    of_layers = [layer.value_norms for layer in found.table.of_heads().layers]
    relative = torch.stack([(norms / norms.transpose(0, 1).flatten(1).median(1).values.clamp(min=1e-30)
                             [None, :, None]).double().mean(1) for norms in of_layers]).mean(0)
    # Sinks of few tokens are listed under their ids; one that is a position would be under every id that stands there.
    place = len(found.rows[found.sinks].unique()) > int(found.sinks.sum()) / 2
    rows = found.rows.masked_fill(found.sinks, PLACE) if place else found.rows
    ids, inverse = rows.unique(return_inverse=True)
    counts = torch.bincount(inverse.flatten(), minlength=len(ids))
    means = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, inverse.flatten(), relative.flatten()) / counts
    sinks = torch.bincount(inverse[found.sinks], minlength=len(ids)) > 0
    usable = torch.nonzero((counts >= MIN_COUNT) | sinks).flatten()
    order = usable[means[usable].argsort()]
    picked = dict.fromkeys([*order[sinks[order]].tolist(), *order[:TOKENS_SHOWN // 2].tolist(),
                            *order[-(TOKENS_SHOWN // 2):].tolist()])
    names = {i: "the sinks, whatever stands there" if ids[i] == PLACE else str(tokenizer.decode([int(ids[i])]))
             for i in picked}
    return [TokenValue(token_id=None if ids[i] == PLACE else int(ids[i]), text=names[i], count=int(counts[i]),
                       norm=float(means[i]), sink=bool(sinks[i]))
            for i in sorted(picked, key=lambda i: float(means[i]))]


def dormant_heads(found: RowSurvey, tokenizer: PreTrainedTokenizerBase) -> list[DormantHead]:
    """The heads that rest on the sinks for most queries, with what switches each on; the most dormant first."""
    rows, length = found.rows.shape
    queries = torch.zeros(rows, length, dtype=torch.bool)
    queries[:, min(EARLY, length - 1):] = True
    queries &= ~found.sinks
    heads = []
    for layer, mass in enumerate(found.table.sink_mass):
        norms, outputs = found.table.layers[layer].value_norms, found.table.head_outputs[layer].mean(0)
        groups = mass.shape[1] // max(norms.shape[1], 1)
        for head in range(mass.shape[1]):
            on = mass[:, head] < ON
            rate = float(on[queries].double().mean())
            if rate > 1 - DORMANT:
                continue
            values = norms[:, head // groups]
            drain = float(values[found.sinks].mean() / values[~found.sinks].median().clamp(min=1e-30))
            heads.append(DormantHead(
                layer=layer, head=head, sink_score=float(mass[:, head][queries].mean()), on_rate=rate,
                output_norm=float(outputs[head] / outputs.mean().clamp(min=1e-30)),
                sink_value_norm=float(values[found.sinks].mean()), value_drain=drain,
                switches=_switches(found, on, queries, found.table.target[layer][:, head], values, rate, tokenizer)))
    return sorted(heads, key=lambda head: head.on_rate)


def _switches(found: RowSurvey, on: torch.Tensor, queries: torch.Tensor, target: torch.Tensor, values: torch.Tensor,
              rate: float, tokenizer: PreTrainedTokenizerBase) -> list[Switch]:
    """The classes of queries in which the head is on at least half of the time and twice as often as over all."""
    before = torch.full_like(found.rows, -1)
    before[:, 1:] = found.rows[:, :-1]
    switches = []
    for relation, keys in (("is", found.rows), ("after", before)):
        ids, inverse = keys[queries].unique(return_inverse=True)
        counts = torch.bincount(inverse, minlength=len(ids))
        rates = torch.bincount(inverse, weights=on[queries].double(), minlength=len(ids)) / counts
        for i in torch.nonzero((counts >= MIN_COUNT) & (rates >= max(ON, 2 * rate))).flatten().tolist():
            mine = queries & on & (keys == ids[i])
            row, _ = torch.nonzero(mine, as_tuple=True)
            place = target[mine]
            attended, votes = found.rows[row, place].unique(return_counts=True)
            switches.append(Switch(
                relation="is" if relation == "is" else "after", token_id=int(ids[i]),
                text=str(tokenizer.decode([int(ids[i])])), count=int(counts[i]), on_rate=float(rates[i]),
                attends_to=str(tokenizer.decode([int(attended[votes.argmax()])])),
                value_norm=float(values[row, place].mean())))
    return sorted(switches, key=lambda s: (-s.on_rate, -s.count))[:SHOWN]
