"""What rounding the token embedding, or the output head, alone would cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import EndLoss, ModelShape
from sinkquant.artifacts.ends import EndDecision
from sinkquant.models import Decoder, Walk
from sinkquant.models.ends import outside_modules, token_table
from sinkquant.models.hooks import compute_in
from sinkquant.models.walk import stubbed, together
from sinkquant.policy.ends import bits_of_ends, choose_ends, end_options
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs import codec_of
from sinkquant.sensitivity.measure import divergence

STEP = 1 << 25
"""Weights of a head that are rounded at a time."""


def end_candidates(shape: ModelShape, recipe: Recipe) -> list[tuple[str, EndDecision]]:
    """Kind and format of all that a budget may choose for the embedding and the head, 16 bits left out."""
    found: dict[tuple[str, int], EndDecision] = {}
    for one in end_options(shape, recipe) if recipe.sensitivity.end_bits else []:
        bits = bits_of_ends(one)
        for name, end in choose_ends(shape, one, False).items():
            found[shape.ends[name].kind, bits[shape.ends[name].kind]] = end
    return [(kind, end) for (kind, _), end in found.items()]


def embedding_loss(walk: Walk, gradients: torch.Tensor, end: EndDecision, recipe: Recipe) -> EndLoss:
    """Half the mean square of what the error of a looked-up row adds to the log-likelihood of a drawn label: the
    divergence to second order, as of the linears (`estimate`).

    Args:
        gradients: [rows, length, hidden_size], of that log-likelihood with respect to the first block's inputs.
    """
    nearest = _nearest(walk.decoder, end, recipe)

    def rounded(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        # Every row has a scale of its own, so that rows may be rounded where they are looked up.
        return nearest.quantize(output.flatten(0, -2)).dequantized().reshape(output.shape).to(output.dtype)

    before = _entered(walk)
    with walk.decoder.model.get_input_embeddings().register_forward_hook(rounded):
        after = _entered(walk)
    scores = [(one.float() * (other.float() - first.float())).sum(-1).double()
              for one, other, first in zip(gradients, after, before, strict=True)]
    total = sum(float(score.square().sum()) for score in scores)
    return EndLoss(kind="embedding", bits=end.bits, loss=total / 2 / gradients.shape[:2].numel())


def _entered(walk: Walk) -> torch.Tensor:
    """What comes into the first block, [rows, length, hidden_size]."""
    other = Walk(walk.decoder, walk.rows, walk.batch_size, walk.device, walk.dtype, store=walk.store)
    with contextlib.closing(together([other])) as steps:
        return next(steps)[0].walk.hidden


def head_loss(walk: Walk, ended: torch.Tensor, end: EndDecision, recipe: Recipe) -> EndLoss:
    """The mean divergence of what the rounded head predicts, row by row.

    Args:
        ended: [rows, length, hidden_size], the outputs of the last block.
    """
    decoder, total = walk.decoder, 0.0
    head = decoder.model.get_output_embeddings()
    outside = [*outside_modules(decoder), head]
    with torch.no_grad(), decoder.present(outside), compute_in(outside, walk.device, walk.dtype):
        rounded = torch.empty_like(head.weight)
        nearest, size = _nearest(decoder, end, recipe), max(1, STEP // head.weight.shape[1])
        for part, kept in zip(head.weight.split(size), rounded.split(size), strict=True):
            kept.copy_(nearest.quantize(part).dequantized(decoder.model.dtype))
        for row, hidden in zip(walk.rows, ended, strict=True):
            with token_table(decoder, row, walk.device, walk.dtype):
                before = _predicted(walk, row, hidden)
                with _weighing(head, rounded):
                    total += divergence(before, _predicted(walk, row, hidden))
    return EndLoss(kind="head", bits=end.bits, loss=total / walk.rows.numel())


def _predicted(walk: Walk, row: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [length, vocabulary], from what the last block gave for a row."""
    with stubbed(walk.decoder, hidden[None].to(walk.device)):
        logits = walk.decoder.model(row[None].to(walk.device), use_cache=False).logits[0].float()
    return torch.log_softmax(logits, -1)


@contextlib.contextmanager
def _weighing(module: nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """Let a module compute with another weight."""
    before = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters["weight"] = before


def _nearest(decoder: Decoder, end: EndDecision, recipe: Recipe) -> Any:
    return codec_of(end.form).nearest(end.form, decoder.scale_dtype, recipe.weights.scale_search)
