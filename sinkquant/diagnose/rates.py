"""Sink rates: over thresholds, over context length, by layer and head; on natural, random and repeated input."""

from __future__ import annotations

from typing import Literal

import torch

from sinkquant.artifacts.diagnosis import SinkRates
from sinkquant.detect.table import AttentionTable
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.survey import Compute
from sinkquant.models import Decoder

EPSILONS = ("0.1", "0.2", "0.3", "0.5", "0.8")
PUBLISHED = 0.3


def first_position_mass(decoder: Decoder, rows: torch.Tensor, compute: Compute,
                        position: int = 0) -> list[torch.Tensor]:
    """alpha_k of Gu et al. (2410.10781, section 3) for one position k: the mean attention that it receives from the
    queries that see it, by layer, float64 [rows, heads]."""
    table = AttentionTable()
    walk = compute.walk(decoder, rows, [table])
    for step in walk.steps():
        step.run()
        table.close_layer()
    return [received[:, :, position].double() / visible[position].clamp(min=1)
            for received, visible in zip(table.received, table.visible, strict=True)]


def sink_rates(mass: list[torch.Tensor], kind: Literal["natural", "random", "repeated"], length: int,
               seed: int) -> SinkRates:
    """Shares of rows, layers and heads over each threshold. `mass`: by layer, [rows, heads]."""
    heads = torch.cat(mass, dim=1)
    rates = {e: measured((heads > float(e)).double().mean(1), seed) for e in EPSILONS}
    return SinkRates(input=kind, length=length, rows=len(heads), rates=rates,
                     layers=[float((layer > PUBLISHED).double().mean()) for layer in mass])


def context_lengths(longest: int) -> list[int]:
    """64, 128, 256, ... up to the longest, which is always one of them."""
    lengths = []
    length = 64
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
