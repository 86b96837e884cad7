"""Heads: how much of their attention sinks, what the sink's value weighs, and which of them do nothing."""

from __future__ import annotations

from typing import Any

import torch

from sinkquant.artifacts import Head
from sinkquant.detect.detector import Detector, Found
from sinkquant.detect.table import AttentionTable
from sinkquant.recipe import Detection


class Heads(Detector):
    """What every query head gives the sinks, and whether it does nothing."""

    fields = ("heads",)
    null = "in random models the largest score of a head is 0.15, and none does nothing"

    def result(self, found: Found) -> dict[str, Any]:
        """As seen in the rows that show the sinks best."""
        best = found.best
        return {"heads": describe_heads(best.table, found.sinks.mask(best.rows), self.settings)}


def describe_heads(table: AttentionTable, sinks: torch.Tensor, settings: Detection) -> list[list[Head]]:
    """Every query head, [layer][head].

    `sink_score` is the mean attention mass on the sink tokens (and the learned column) by the queries from the row's
    first sink on, over the rows that hold one; where the model has no sink, on the first position, so that a null can
    be compared. `value_drain` is ||v_sink|| / median ||v_t|| (Barbero et al. 2504.02732, section 5; null without a
    sink token), `output_norm` the head's mean output norm over the mean of its layer (2504.03889). A no-op head sinks
    nearly all of its attention and writes little.

    Args:
        sinks: bool [rows, length], the positions that hold a sink token.
    """
    described: list[list[Head]] = []
    marked = sinks.clone()
    if not marked.any() and not table.has_learned_sink:
        marked[:, 0] = True
    length = sinks.shape[1]
    has = marked.any(dim=1)
    queries = (length - marked.float().argmax(dim=1)).float()
    for layer in table.layers:
        heads = layer.received.shape[1]
        if not heads:
            described.append([])
            continue
        mass = (layer.received * marked[:, None]).sum(-1) / queries[:, None]
        score = (mass[has].mean(0) if has.any() else 0) + layer.learned.mean(0)
        groups = heads // layer.value_norms.shape[1]
        drain = _value_drain(layer.value_norms, sinks)
        norm = layer.output_norms / layer.output_norms.mean().clamp(min=1e-30)
        described.append([
            Head(sink_score=float(score[h]), value_drain=None if drain is None else float(drain[h // groups]),
                 output_norm=float(norm[h]),
                 no_op=bool(score[h] >= settings.no_op_sink_score and norm[h] <= settings.no_op_output_norm))
            for h in range(heads)])
    return described


def _value_drain(values: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor | None:
    """[kv_heads], or None where no token is a sink. `values`: [rows, kv_heads, length] norms."""
    if not sinks.any() or sinks.all():
        return None
    per_head = values.transpose(0, 1)
    return per_head[:, sinks].mean(1) / per_head[:, ~sinks].median(dim=1).values.clamp(min=1e-30)
