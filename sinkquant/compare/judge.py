"""What the figures of several models say about one another: the Pareto front, pairs, and warnings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from sinkquant.artifacts.comparison import ComparedPair, ComparedRow
from sinkquant.compare.figures import over_rows

SILENT = ("near the baseline KL divergence measures how much changes and not whether it gets worse, and does not "
          "predict how tasks rank (arXiv 2606.19558)")


def with_front(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """By size, those marked that no other is as small as and as close: the Pareto front of bytes and mean KL."""
    def beaten(row: ComparedRow) -> bool:
        return any(other is not row and other.bytes <= row.bytes and _kl(other) <= _kl(row)
                   and (other.bytes, _kl(other)) != (row.bytes, _kl(row)) for other in rows)

    return sorted((row.model_copy(update={"pareto": not beaten(row)}) for row in rows),
                  key=lambda row: (row.bytes, _kl(row), row.name))


def neighbours(kl: Mapping[str, torch.Tensor]) -> list[ComparedPair]:
    """Pairs that stand next to one another by mean divergence. kl: name -> [rows], nats per token."""
    order = sorted(kl, key=lambda name: float(kl[name].mean()))
    return [ComparedPair(a=worse, b=better, difference=over_rows(kl[worse] - kl[better]))
            for better, worse in itertools.pairwise(order)]


def warnings(checkpoints: Sequence[ComparedRow], floor: Sequence[ComparedRow],
             pairs: Sequence[ComparedPair]) -> list[str]:
    """Where differences are below what these figures can tell."""
    found = []
    noise = max((_kl(row) for row in floor), default=0.0)
    lost = [row.name for row in checkpoints if _kl(row) <= noise]
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


def _kl(row: ComparedRow) -> float:
    assert row.kl is not None
    return row.kl.value
