"""Sink rates: over thresholds, over context length, by layer and head; on natural, random and repeated input."""

from __future__ import annotations

from typing import Literal

import torch

from sinkquant.artifacts.diagnosis import SinkRates
from sinkquant.detect.table import attention_of
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import AttentionRecord, AttentionRows, Decoder

EPSILONS = ("0.1", "0.2", "0.3", "0.5", "0.8")
PUBLISHED = 0.3


def first_position_mass(decoder: Decoder, rows: torch.Tensor, compute: WalkSettings) -> list[torch.Tensor]:
    """alpha_1 of Gu et al. (2410.10781, section 3): the mean attention that the first position receives from the
    queries that see it, by layer, float64 [rows, heads]."""
    return [layer.received[:, :, 0].double() / layer.visible[0].clamp(min=1)
            for layer in attention_of(compute.walk(decoder, rows)).layers]


class _FirstColumn:
    """An observer that keeps what position 0 receives from the first queries of every row, for several lengths.

    Attributes: layers: [rows, heads, lengths] float64 per layer, the mean over the queries below each length that see
    position 0.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths)
        self.layers: list[torch.Tensor] = []
        self._chunks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._batches: list[torch.Tensor] = []

    def attention_rows(self, rows: AttentionRows) -> None:
        self._chunks.append((rows.probabilities[..., 0].double().cpu(), rows.allowed[:, 0].double().cpu()))

    def attention(self, record: AttentionRecord) -> None:
        received, seen = (torch.cat(parts, dim=-1).cumsum(-1) for parts in zip(*self._chunks, strict=True))
        self._chunks = []
        self._batches.append(received[..., self.ends - 1] / seen[self.ends - 1].clamp(min=1))

    def close_layer(self, rows: torch.Tensor) -> None:
        nobody = torch.zeros(len(rows), 0, len(self.ends), dtype=torch.float64)  # no attention matrix, no heads
        self.layers.append(torch.cat(self._batches) if self._batches else nobody)
        self._batches = []


def first_position_mass_by_length(decoder: Decoder, rows: torch.Tensor, lengths: list[int],
                                  compute: WalkSettings) -> list[list[torch.Tensor]]:
    """`first_position_mass` of the first so many tokens of the rows, for every length, from one walk: attention is
    causal, so that a row's beginning does not know what follows.

    Args:
        rows: int64 [rows, at least the longest of `lengths`].

    Returns:
        By length, by layer, float64 [rows, heads].
    """
    column = _FirstColumn(lengths)
    walk = compute.walk(decoder, rows)
    walk.observers.append(column)
    for step in walk.steps():
        step.run()
        column.close_layer(rows)
    return [[layer[..., i] for layer in column.layers] for i in range(len(lengths))]


def sink_rates(mass: list[torch.Tensor], kind: Literal["natural", "random", "repeated"], length: int,
               seed: int) -> SinkRates:
    """Shares of rows, layers and heads over each threshold. `mass`: by layer, [rows, heads]."""
    heads = torch.cat(mass, dim=1)
    rates = {e: measured((heads > float(e)).double().mean(1), seed) for e in EPSILONS}
    return SinkRates(input=kind, length=length, rows=len(heads), rates=rates,
                     layers=[float((layer > PUBLISHED).double().mean()) if layer.numel() else 0.0 for layer in mass])


def context_lengths(longest: int, first: int = 64) -> list[int]:
    """`first`, twice as many, and so on up to the longest, which is always one of them."""
    lengths = []
    length = first
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
