"""Mean KL divergence of a quantized model's next-token distribution from the unquantized one's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import cached_logits
from sinkquant.models import token_rows
from sinkquant.recipe import Recipe

POSITIONS = 128
LOGITS_BYTES = 1 << 28
"""What the float32 logits of one batch may take, per model; one row is always run."""


@dataclass(frozen=True)
class Divergence:
    """Two models on the same rows, one number per row.

    Attributes:
        kl: KL(baseline || other) in nats per token, averaged over all positions.
        baseline_loss, other_loss: cross-entropy of the next token in nats, averaged over all positions but the last.
    """

    kl: list[float] = field(default_factory=list)
    baseline_loss: list[float] = field(default_factory=list)
    other_loss: list[float] = field(default_factory=list)


def compare_rows(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor,
                 batch_size: int = 4, kv: KVCachePlan | None = None) -> Divergence:
    """Run both models over the same rows and compare what they predict.

    Two others compared with the same baseline on the same rows are pairs, row by row.

    Args:
        rows: int64 [rows, length], `<bos>` where the models expect it.
        batch_size: at most so many rows at a time; fewer where a large vocabulary would take too much memory.
        kv: run the other model through a KV cache that is packed so; null for none.
    """
    width = int(baseline.get_input_embeddings().weight.shape[0])
    batch_size = max(1, min(batch_size, LOGITS_BYTES // (4 * rows.shape[1] * width)))
    found = Divergence()
    with torch.no_grad():
        for batch in rows.split(batch_size):
            first = baseline(batch.to(baseline.device), use_cache=False).logits
            ids = batch.to(other.device)
            second = other(ids, use_cache=False).logits if kv is None else cached_logits(other, ids, kv)
            second = second.to(first.device)
            kl, one, two = _compare(first, second, batch.to(first.device))
            # Rounding can leave a row of equal distributions a hair below zero.
            found.kl.extend(kl.mean(1).clamp(min=0).tolist())
            found.baseline_loss.extend(one.mean(1).tolist())
            found.other_loss.extend(two.mean(1).tolist())
    return found


def held_out_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, content: str, recipe: Recipe,
                  limit: int) -> torch.Tensor:
    """The rows of the evaluation text `content` that models are compared on, int64 [rows, length].

    Args:
        limit: tokens that a row may have at most.
    """
    settings = recipe.evaluate
    return token_rows(tokenizer, content, settings.divergence_rows, min(settings.divergence_length, limit),
                      recipe.calibration.bos, int(model.get_input_embeddings().weight.shape[0]), "evaluation text")


def row_divergences(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor,
                    batch_size: int = 4, kv: KVCachePlan | None = None) -> list[float]:
    """KL(baseline || other) in nats per token, averaged over the positions of every row; see `compare_rows`."""
    return compare_rows(baseline, other, rows, batch_size, kv).kl


def _compare(first: torch.Tensor, second: torch.Tensor,
             rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL [rows, length] and both losses [rows, length - 1], float64, from logits [rows, length, vocabulary].

    A few positions at a time: the float32 copies of the distributions are the largest thing here.
    """
    kl, one, two = [], [], []
    for start in range(0, rows.shape[1], POSITIONS):
        part = slice(start, start + POSITIONS)
        p = torch.log_softmax(first[:, part].float(), dim=-1)
        q = torch.log_softmax(second[:, part].float(), dim=-1)
        kl.append((p.exp() * (p - q)).sum(-1).double())
        following = rows[:, start + 1:start + 1 + POSITIONS, None]
        known = following.shape[1]
        one.append(-p[:, :known].gather(-1, following).squeeze(-1).double())
        two.append(-q[:, :known].gather(-1, following).squeeze(-1).double())
    return torch.cat(kl, dim=1), torch.cat(one, dim=1), torch.cat(two, dim=1)
