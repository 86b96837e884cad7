"""What one model shows on the rows, beside the baseline: one number per token, made into figures with intervals; and
what the figures of several models say about one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan
from sinkquant.artifacts.comparison import ComparedPair, ComparedRow, Interval
from sinkquant.errors import SinkquantError
from sinkquant.evaluate import TokenFigures, token_figures
from sinkquant.evaluate.divergence import BATCH_ROWS
from sinkquant.evaluate.looks import ERROR, interval
from sinkquant.evaluate.positions import by_position
from sinkquant.evaluate.states import last_states
from sinkquant.models.head import OutputHead

SILENT = ("near the baseline KL divergence measures how much changes and not whether it gets worse, and does not "
          "predict how tasks rank (arXiv 2606.19558)")


@dataclass(frozen=True)
class Reference:
    """The unquantized model on the rows: its blocks run once for all that is compared with it.

    Attributes:
        batches: int64 [rows, length] each. states: what the output head is given for each.
    """

    model: PreTrainedModel
    batches: tuple[torch.Tensor, ...]
    states: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, rows: torch.Tensor, batch_rows: int = BATCH_ROWS) -> Reference:
        """Run the model. rows: int64 [rows, length]."""
        batches = rows.split(batch_rows)
        return cls(model, batches, tuple(last_states(model, batch) for batch in batches))

    def against(self, other: PreTrainedModel, kv: KVCachePlan | None = None,
                given: Sequence[torch.Tensor] | None = None) -> TokenFigures:
        """Every token of every row.

        Args:
            kv: run the other model through a packed cache.
            given: the other model's states of every batch, where they are known.

        Raises:
            SinkquantError: what the other model predicts is not finite.
        """
        heads = [OutputHead(self.model), OutputHead(other)]
        found = []
        for place, (batch, mine) in enumerate(zip(self.batches, self.states, strict=True)):
            theirs = last_states(other, batch, kv) if given is None else given[place]
            found.append(token_figures(heads, [mine, theirs], batch)[0])
        together = TokenFigures(*(torch.cat([getattr(one, name) for one in found])
                                  for name in ("kl", "baseline_loss", "other_loss", "same_top")))
        if not torch.isfinite(together.kl).all():
            raise SinkquantError("what the model predicts is not finite: its weights, or what they make of this text, "
                                 "overflow.")
        return together


def divergence_figures(tokens: TokenFigures) -> dict[str, Any]:
    """The fields of a `ComparedRow` that say how far a model is from the baseline."""
    kl = tokens.kl.clamp(min=0)
    values = kl.flatten().numpy()
    change = tokens.other_loss.mean(1) - tokens.baseline_loss.mean(1)
    ratio = over_rows(change)
    same = over_rows(tokens.same_top.double().mean(1))
    return {"kl": over_rows(kl.mean(1)), "kl_median": float(np.median(values)),
            "kl_99": float(np.quantile(values, 0.99)), "kl_99_9": float(np.quantile(values, 0.999)),
            "kl_by_position": by_position(kl),
            "same_top": same.model_copy(update={"low": max(0.0, same.low), "high": min(1.0, same.high)}),
            "perplexity": exponential(over_rows(tokens.other_loss.mean(1))), "perplexity_ratio": exponential(ratio),
            "loss_shown": not ratio.low <= 0 <= ratio.high}


def over_rows(values: torch.Tensor) -> Interval:
    """A mean over rows with Student's interval; values: [rows], two or more."""
    found = interval(values.tolist(), ERROR)
    return Interval(value=found.mean, low=found.low, high=found.high)


def exponential(one: Interval) -> Interval:
    """Of losses, or of a difference of them: perplexities, or their ratio; the largest number where it is over it."""
    return Interval(**{name: math.exp(min(getattr(one, name), 700.0)) for name in ("value", "low", "high")})


def with_front(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """By size, those marked that no other is as small as and as close: the Pareto front of bytes and mean KL."""
    def beaten(row: ComparedRow) -> bool:
        return any(other is not row and other.bytes <= row.bytes and other.mean_kl <= row.mean_kl
                   and (other.bytes, other.mean_kl) != (row.bytes, row.mean_kl) for other in rows)

    return sorted((row.model_copy(update={"pareto": not beaten(row)}) for row in rows),
                  key=lambda row: (row.bytes, row.mean_kl, row.name))


def neighbours(kl: Mapping[str, torch.Tensor]) -> list[ComparedPair]:
    """Pairs that stand next to one another by mean divergence. kl: name -> [rows], nats per token."""
    order = sorted(kl, key=lambda name: float(kl[name].mean()))
    return [ComparedPair(a=worse, b=better, difference=over_rows(kl[worse] - kl[better]))
            for better, worse in itertools.pairwise(order)]


def warnings(checkpoints: Sequence[ComparedRow], floor: Sequence[ComparedRow],
             pairs: Sequence[ComparedPair]) -> list[str]:
    """Where differences are below what these figures can tell."""
    found = []
    noise = max((row.mean_kl for row in floor), default=0.0)
    lost = [row.name for row in checkpoints if row.mean_kl <= noise]
    if lost:
        found.append(f"{', '.join(lost)}: no farther from the baseline than the baseline is from itself computed in "
                     f"another way (KL {noise:.2g})")
    found += [f"{pair.a} and {pair.b} are not told apart on this text: their KL differs by "
              f"{pair.difference.value:.2g}, 95 % interval {pair.difference.low:.2g} to {pair.difference.high:.2g}"
              for pair in pairs if pair.difference.low <= 0 <= pair.difference.high]
    silent = [row.name for row in checkpoints if row.loss_shown is False]
    if len(silent) > 1:
        found.append(f"{', '.join(silent)}: no loss of perplexity is shown for any of them, so do not rank them by KL: "
                     f"{SILENT}; measure the tasks that matter to you (--tasks)")
    return found
