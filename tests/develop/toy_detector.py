"""A detector from outside the package: how much alike the tokens of a row are after every block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sinkquant.detect import Detector, Found, Survey
from sinkquant.models import Decoder, Step
from sinkquant.recipe import Recipe


class Anisotropy(Detector):
    """Mean cosine similarity of two tokens of a row (Ethayarajh 1909.00512), sinks left out."""

    fields = ("similarity", "block")
    null = "0, give or take 1 / sqrt(hidden size), for random directions"

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        self.directions: list[torch.Tensor] = []

    @contextlib.contextmanager
    def watch(self, survey: Survey, step: Step) -> Iterator[None]:
        """Keep the directions of the block's outputs, of one set of rows."""
        yield
        if survey.recorded and step.outputs is not None:
            self.directions.append(torch.nn.functional.normalize(step.outputs.float(), dim=-1))

    def result(self, found: Found) -> dict[str, Any]:
        """The similarity after every block, and the block where it is largest."""
        sinks = found.sinks.mask(found.surveys[-1].rows)
        similarity = [_mean_cosine(one.masked_fill(sinks[..., None], 0), ~sinks) for one in self.directions]
        return {"similarity": similarity, "block": similarity.index(max(similarity))}


def _mean_cosine(directions: torch.Tensor, kept: torch.Tensor) -> float:
    """Over all pairs of tokens of a row. directions: [rows, length, hidden_size]; kept: bool [rows, length]."""
    counts = kept.sum(1).float()
    pairs = directions.sum(1).square().sum(-1) - counts
    return float((pairs / (counts * (counts - 1))).mean())
