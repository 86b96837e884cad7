"""Outlier tokens at the inputs of down projections, and the prefix that they make (PrefixQuant 2410.05265).

A token is an outlier where its largest |input| is over a threshold times the median token's of its row. The prefix
holds the most frequent ones, then `<bos>`, as in the authors' code; it is meant to stand in front of every row and take
the outliers upon itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import OutlierPrefix
from sinkquant.detect.detector import Detector, Found, Survey
from sinkquant.detect.super_weights import down_projection
from sinkquant.models import Decoder, Step
from sinkquant.recipe import Recipe

RARE = 0.1
"""A lone outlier token that occurs less than so often per row is left out, as the paper's code does."""


class OutlierTokens(Detector):
    """The prefix of outlier tokens."""

    fields = ("outlier_prefix",)
    null = "over five random models of each of thirteen families the largest ratio is 4.1"

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        self.largest: dict[str, list[torch.Tensor]] = {}

    def watch(self, survey: Survey, step: Step) -> AbstractContextManager[None]:
        """Keep every token's largest input of the block's down projection, of one set of rows."""
        name = down_projection(self.decoder, step.index) if survey.recorded else None
        return contextlib.nullcontext() if name is None else self._watching(name)

    def result(self, found: Found) -> dict[str, Any]:
        """None, with a note, where no block has one down projection that sees every token."""
        rows = found.surveys[-1].rows
        largest = [values.view(rows.shape) for parts in self.largest.values()
                   if len(values := torch.cat(parts)) == rows.numel()]
        if not largest:
            found.notes.append("outlier tokens were not looked for: no block has one down projection that sees every "
                               "token")
            return {"outlier_prefix": None}
        bos = found.facts.bos_token_id if found.facts.rows_start_with_bos else None
        return {"outlier_prefix": outlier_prefix(largest, rows, self.settings.outlier_ratio, bos, found.tokenizer)}

    @contextlib.contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.largest.setdefault(name, []).append(args[0].abs().flatten(0, -2).amax(1).float().cpu())

        with self.decoder.linears[name].register_forward_pre_hook(hook):
            yield


def outlier_prefix(largest: list[torch.Tensor], rows: torch.Tensor, ratio: float, bos: int | None,
                   tokenizer: PreTrainedTokenizerBase) -> OutlierPrefix:
    """The prefix by the published rule.

    Its length is the mean number of outliers per row, of the layer with the most, rounded up; outliers at position 0
    count in it, but only other positions say which tokens are meant. Without any outlier the prefix is empty.

    Args:
        largest: of every layer float32 [rows, length], the largest |input| of every token.
        rows: int64 [rows, length].
        bos: what the rows start with, or None.
    """
    count, peak = 0, 0.0
    seen = torch.zeros(int(rows.max()) + 1, dtype=torch.long)
    for values in largest:
        median = values.median(dim=1, keepdim=True).values
        # Where most tokens drive no neuron at all, the median says nothing.
        ratios = torch.where(median > 0, values / median, 0.0)
        outliers = ratios > ratio
        peak = max(peak, float(ratios.max()))
        count = max(count, math.ceil(int(outliers.sum()) / len(rows)))
        seen += torch.bincount(rows[:, 1:][outliers[:, 1:]], minlength=len(seen))
    if bos is not None:
        seen[bos] = 0
    order = [int(i) for i in seen.argsort(descending=True, stable=True) if seen[i]]
    if len(order) == 1 and int(seen[order[0]]) < RARE * len(rows):
        order, count = [], count - 1
    ids = order[:count] + ([bos] if bos is not None and count else [])
    return OutlierPrefix(token_ids=ids, texts=[str(tokenizer.decode([token])) for token in ids], count=count,
                         largest_ratio=peak, layers=len(largest))
