"""Outlier tokens at the inputs of down projections, and the prefix that they make (PrefixQuant 2410.05265).

A token is an outlier where its largest |input| is over a threshold times the median token's of its row. The prefix
holds the most frequent ones, then `<bos>`, as in the authors' code; it is meant to stand in front of every row and take
the outliers upon itself.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import OutlierPrefix
from sinkquant.detect.modules import InputRecorder
from sinkquant.detect.super_weights import down_projection
from sinkquant.models import Decoder

RARE = 0.1
"""A lone outlier token that occurs less than so often per row is left out, as the paper's code does."""


def outlier_prefix(decoder: Decoder, inputs: InputRecorder, rows: torch.Tensor, ratio: float, bos: int | None,
                   tokenizer: PreTrainedTokenizerBase) -> OutlierPrefix | None:
    """The prefix by the published rule, or None where no block has one down projection that sees every token.

    Its length is the mean number of outliers per row, of the layer with the most, rounded up; outliers at position 0
    count in it, but only other positions say which tokens are meant. Without any outlier the prefix is empty.

    Args:
        inputs: what was recorded of these rows.
        rows: int64 [rows, length].
        bos: what the rows start with, or None.
    """
    names = [down_projection(decoder, index) for index in range(len(decoder.blocks))]
    largest = [values.view(rows.shape) for name in names if name is not None
               and (values := inputs.largest(name)) is not None and len(values) == rows.numel()]
    if not largest:
        return None
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
