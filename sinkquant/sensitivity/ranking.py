"""How well the cheap estimate ranks what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sinkquant.artifacts import FormatLoss, Ranking, Terms, UnitSensitivity


def ranking(units: Sequence[UnitSensitivity]) -> Ranking:
    """Spearman's rank correlations over all units and formats that were measured."""
    pairs = [(loss.predicted, loss.measured) for unit in units for loss in unit.losses if loss.measured is not None]
    formats: dict[tuple[int, int, str], list[FormatLoss]] = {}
    for unit in units:
        for loss in unit.losses:
            formats.setdefault((loss.bits, loss.group_size, loss.method), []).append(loss)
    among = [found for losses in formats.values() if (found := _spearman(
        [(loss.predicted, loss.measured) for loss in losses if loss.measured is not None], "total")) is not None]
    measured = sum(two.total for _, two in pairs)
    return Ranking(total=_spearman(pairs, "total"), sinks=_spearman(pairs, "sinks"), others=_spearman(pairs, "others"),
                   between=float(np.mean(among)) if among else None,
                   ratio=sum(one.total for one, _ in pairs) / measured if measured > 0 else None, pairs=len(pairs))


def _spearman(pairs: Sequence[tuple[Terms, Terms]], term: str) -> float | None:
    one, two = ([getattr(terms, term) for terms in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
    return spearman(one, two)


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two is constant."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return None
    from scipy.stats import spearmanr  # a second, which only measured sensitivities need

    return float(spearmanr(one, two).statistic)
