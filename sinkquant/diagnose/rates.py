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


def first_position_mass(decoder: Decoder, rows: torch.Tensor, compute: Compute, position: int = 0) -> torch.Tensor:
    """alpha_k of Gu et al. (2410.10781, section 3) for one position k: the mean attention that it receives from the
    queries that see it, float64 [layers, rows, heads]."""
    table = AttentionTable()
    walk = compute.walk(decoder, rows, [table])
    for step in walk.steps():
        step.run()
        table.close_layer()
    return torch.stack([received[:, :, position].double() / visible[position].clamp(min=1)
                        for received, visible in zip(table.received, table.visible, strict=True)])


def sink_rates(mass: torch.Tensor, kind: Literal["natural", "random", "repeated"], length: int,
               seed: int) -> SinkRates:
    """Shares of rows, layers and heads over each threshold. `mass`: [layers, rows, heads]."""
    rates = {e: measured((mass > float(e)).double().mean(dim=(0, 2)), seed) for e in EPSILONS}
    return SinkRates(input=kind, length=length, rows=mass.shape[1], rates=rates,
                     layers=(mass > PUBLISHED).double().mean(dim=(1, 2)).tolist())


def context_lengths(longest: int) -> list[int]:
    """64, 128, 256, ... up to the longest, which is always one of them."""
    lengths = []
    length = 64
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
