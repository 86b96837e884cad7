"""Where attention goes in one short text: every head's attention matrix, small enough for a report to carry."""

from __future__ import annotations

import base64

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts.fidelity import AttentionSample
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import AttentionRecord, AttentionRows, Decoder

TOKENS = 40
MOST_BYTES = 300_000
"""Of one side: models with more heads are shown by layer, averaged over heads."""


class _Matrices:
    """An observer that keeps the attention of one short row, [heads, length, length] per layer."""

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []
        self._chunks: list[torch.Tensor] = []

    def attention_rows(self, rows: AttentionRows) -> None:
        self._chunks.append(rows.probabilities[0].cpu())

    def attention(self, record: AttentionRecord) -> None:
        self.layers.append(torch.cat(self._chunks, dim=1))
        self._chunks = []


def attention_of(decoder: Decoder, row: torch.Tensor, compute: WalkSettings) -> torch.Tensor:
    """Attention of every head on one row, float32 [layers, heads, length, length]; of the mean of each layer's heads
    where layers differ in their number. `row`: int64 [at most TOKENS]."""
    observer = _Matrices()
    walk = compute.walk(decoder, row[None, :TOKENS])
    walk.observers.append(observer)
    for step in walk.steps():
        step.run()
    if len({len(layer) for layer in observer.layers}) > 1:
        return torch.stack([layer.mean(0, keepdim=True) for layer in observer.layers])
    return torch.stack(observer.layers)


def attention_sample(before: torch.Tensor, after: torch.Tensor, row: torch.Tensor,
                     tokenizer: PreTrainedTokenizerBase) -> AttentionSample:
    """Both models' attention on a row as a report carries it: lower triangles, one byte per entry.

    Args:
        before, after: [layers, heads, length, length]; row: int64 [length or more].
    """
    layers, heads, length, _ = before.shape
    if layers * heads * length * (length + 1) // 2 > MOST_BYTES:
        before, after, heads = before.mean(1, keepdim=True), after.mean(1, keepdim=True), 1
    down, across = torch.tril_indices(length, length)

    def packed(matrices: torch.Tensor) -> str:
        triangle = (matrices[:, :, down, across] * 255).round().clamp(0, 255).to(torch.uint8)
        return base64.b64encode(triangle.numpy().tobytes()).decode("ascii")

    return AttentionSample(tokens=[str(tokenizer.decode([int(token)])) for token in row[:length]], layers=layers,
                           heads=heads, before=packed(before), after=packed(after))
