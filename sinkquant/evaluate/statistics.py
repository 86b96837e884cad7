"""Paired bootstrap over documents."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

from sinkquant.evaluate.harness import value_of

Samples = tuple[list[float], list[float]]


def paired_difference(metric: str, a: Samples, b: Samples, resamples: int, seed: int) -> tuple[float, float, float]:
    """metric(a) - metric(b) over the same documents, with its 95 % percentile bootstrap interval.

    Args:
        a, b: per document (numerators, denominators); the metric is a function of their ratio of sums.

    Returns:
        difference, low, high. The interval is the difference itself where all documents agree, or there is but one.
    """
    columns = [np.asarray(part, dtype=np.float64) for part in (*a, *b)]

    def statistic(at: np.ndarray, ab: np.ndarray, bt: np.ndarray, bb: np.ndarray, axis: int = -1) -> np.ndarray:
        first = value_of(metric, at.sum(axis), ab.sum(axis))
        return np.asarray(first - value_of(metric, bt.sum(axis), bb.sum(axis)))

    difference = float(statistic(*columns))
    same = np.array_equal(columns[0], columns[2]) and np.array_equal(columns[1], columns[3])
    if same or len(columns[0]) < 2:
        return difference, difference, difference
    result = bootstrap(columns, statistic, paired=True, vectorized=True, n_resamples=resamples, batch=200,
                       method="percentile", rng=np.random.default_rng(seed))
    return difference, float(result.confidence_interval.low), float(result.confidence_interval.high)


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
