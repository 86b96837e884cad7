"""The attention of a short text as a report shows it: decoded for the table behind the picture."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

from sinkquant.artifacts.fidelity import AttentionSample


@dataclass(frozen=True)
class Line:
    """One token of the sample and where most of its attention goes, over all heads and layers."""

    position: int
    token: str
    target_position: int
    target: str
    before: float
    after: float


def lines(sample: AttentionSample) -> list[Line]:
    """The table behind the picture. Shares are of 1, means over all layers and heads."""
    before, after = (mean_attention(sample, packed) for packed in (sample.before, sample.after))
    found = []
    for position, token in enumerate(sample.tokens):
        target = int(before[position].argmax())
        found.append(Line(position, visible(token), target, visible(sample.tokens[target]),
                          float(before[position, target]), float(after[position, target])))
    return found


def mean_attention(sample: AttentionSample, packed: str) -> np.ndarray:
    """[tokens, tokens], the mean over layers and heads of one side of a sample."""
    length = len(sample.tokens)
    triangles = np.frombuffer(base64.b64decode(packed), dtype=np.uint8).reshape(-1, length * (length + 1) // 2)
    matrix = np.zeros((length, length))
    matrix[np.tril_indices(length)] = triangles.mean(axis=0) / 255
    return matrix


def visible(token: str) -> str:
    """A token whose white space can be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"
