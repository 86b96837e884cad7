"""Mean KL divergence of quantized models' next-token distributions from the unquantized one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.errors import RequestError
from sinkquant.evaluate.positions import binned
from sinkquant.evaluate.states import last_states
from sinkquant.models import token_rows, vocabulary_of
from sinkquant.models.head import OutputHead, runs_of_positions
from sinkquant.recipe import Recipe

BATCH_ROWS = 4
Reader = tuple[PreTrainedModel, KVCachePlan | None]
"""A model, and the packed KV cache that it is read through; null for none."""


@dataclass(frozen=True)
class Divergence:
    """Two models on the same rows, one number per row.

    Attributes:
        kl: KL(baseline || other) in nats per token, averaged over all positions.
        by_position: the same over bins of positions, see `positions.bins`.
        baseline_loss, other_loss: cross-entropy of the next token in nats, averaged over all positions but the last.
    """

    kl: list[float] = field(default_factory=list)
    by_position: list[list[float]] = field(default_factory=list)
    baseline_loss: list[float] = field(default_factory=list)
    other_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TokenFigures:
    """Two models on the same rows, one number per token, on the CPU.

    Attributes:
        kl: float64 [rows, length], KL(baseline || other) in nats; rounding can leave it a hair below zero.
        baseline_loss, other_loss: float64 [rows, length - 1], cross-entropy of the next token in nats.
        same_top: bool [rows, length], whether both think the same token likeliest.
    """

    kl: torch.Tensor
    baseline_loss: torch.Tensor
    other_loss: torch.Tensor
    same_top: torch.Tensor


def compare_rows(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor,
                 batch_size: int = BATCH_ROWS, kv: KVCachePlan | None = None) -> Divergence:
    """Run both models over the same rows and compare what they predict.

    Two others compared with the same baseline on the same rows are pairs, row by row.

    Args:
        rows: int64 [rows, length], `<bos>` where the models expect it.
        batch_size: rows at a time.
        kv: run the other model through a KV cache that is packed so; null for none.
    """
    batches = rows.split(batch_size)
    return compare_side_by_side(baseline, [last_states(baseline, batch) for batch in batches], [(other, kv)],
                                batches)[0]


def compare_side_by_side(baseline: PreTrainedModel, states: Sequence[torch.Tensor], others: Sequence[Reader],
                         batches: Sequence[torch.Tensor]) -> list[Divergence]:
    """Compare several models with one, whose predictions are made once for all of them.

    Args:
        states: the baseline's `last_states` of every batch.
        batches: int64 [rows, length] each.

    Returns:
        one divergence per other model, over the rows of all batches.
    """
    found = [Divergence() for _ in others]
    heads = [OutputHead(model) for model in (baseline, *(model for model, _ in others))]
    for batch, first in zip(batches, states, strict=True):
        given = [first, *(last_states(model, batch, kv) for model, kv in others)]
        for one, tokens in zip(found, token_figures(heads, given, batch), strict=True):
            # Rounding can leave a row of equal distributions a hair below zero.
            one.kl.extend(tokens.kl.mean(1).clamp(min=0).tolist())
            one.by_position.extend(binned(tokens.kl).clamp(min=0).tolist())
            one.baseline_loss.extend(tokens.baseline_loss.mean(1).tolist())
            one.other_loss.extend(tokens.other_loss.mean(1).tolist())
    return found


def held_out_rows(vocabulary: int, tokenizer: PreTrainedTokenizerBase, content: str, recipe: Recipe,
                  limit: int) -> torch.Tensor:
    """The rows of the evaluation text `content` that models are compared on, int64 [rows, length].

    Args:
        vocabulary: ids that the model has. limit: tokens that a row may have at most.

    Raises:
        RequestError: the text is too short for one, or the tokenizer is of a larger vocabulary.
    """
    settings = recipe.evaluate
    return token_rows(tokenizer, content, settings.divergence_rows, min(settings.divergence_length, limit),
                      recipe.calibration.bos, vocabulary, "evaluation text", "evaluate.divergence_length")


def require_vocabulary(model: PreTrainedModel, name: str, vocabulary: int) -> None:
    """Raises RequestError where a model has another number of ids than its baseline."""
    if vocabulary_of(model) != vocabulary:
        raise RequestError(f"{name} has a vocabulary of {vocabulary_of(model)} and the baseline one of {vocabulary}: "
                           "it was not made of that model.")


def token_figures(heads: Sequence[OutputHead], states: Sequence[torch.Tensor],
                  rows: torch.Tensor) -> list[TokenFigures]:
    """Of every model but the first, beside the first.

    Args:
        heads: of all models, the baseline first. states: their `last_states`, alike.
        rows: int64 [rows, length].

    A few positions at a time, all models side by side: logits of a large vocabulary are the largest thing here.
    """
    count, length = rows.shape
    targets = torch.cat([rows[:, 1:], rows[:, :1]], dim=1).flatten()  # the last position's is not looked at
    flat = [one.flatten(0, 1) for one in states]
    kl, losses = ([torch.empty(count * length, dtype=torch.float64) for _ in heads] for _ in range(2))
    same = [torch.empty(count * length, dtype=torch.bool) for _ in heads]
    for run in runs_of_positions(heads[0].vocabulary, count * length):
        p = torch.log_softmax(heads[0].logits(flat[0][run]), dim=-1)
        following = targets[run, None].to(p.device)
        losses[0][run] = -p.gather(-1, following)[:, 0].double().cpu()
        likely, top = p.exp(), p.argmax(-1)
        for place in range(1, len(heads)):
            q = torch.log_softmax(heads[place].logits(flat[place][run]).to(p.device), dim=-1)
            losses[place][run] = -q.gather(-1, following)[:, 0].double().cpu()
            kl[place][run] = (likely * (p - q)).sum(-1).double().cpu()
            same[place][run] = (q.argmax(-1) == top).cpu()
    whole = [loss.view(count, length)[:, :-1] for loss in losses]
    return [TokenFigures(kl[place].view(count, length), whole[0], whole[place], same[place].view(count, length))
            for place in range(1, len(heads))]
