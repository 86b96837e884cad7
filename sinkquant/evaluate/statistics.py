"""Metrics as ratios of sums over documents, their standard errors, and the paired bootstrap over documents."""

from __future__ import annotations

import math

import numpy as np

Samples = tuple[list[float], list[float]]
"""Per document: numerators, denominators. The metric is a function of the ratio of their sums."""


def named(metric: str) -> str:
    """A metric by its name alone: lm-eval puts a filter's behind a comma."""
    return metric.partition(",")[0]


def value_of(metric: str, top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray:
    """A metric from sums over documents, as lm-eval aggregates it: exp(-x) for perplexities, x for means."""
    ratio = np.asarray(top, dtype=np.float64) / np.asarray(bottom, dtype=np.float64)
    if named(metric).endswith("perplexity"):
        return np.asarray(np.exp(-ratio))
    if named(metric) == "bits_per_byte":
        return np.asarray(-ratio / math.log(2.0))
    return ratio


def standard_error(metric: str, samples: Samples) -> float | None:
    """Of the metric over documents, by the delta method for a ratio of sums; None for fewer than two documents.

    For plain means it is the standard error of the mean.
    """
    top, bottom = (np.asarray(part, dtype=np.float64) for part in samples)
    if len(top) < 2:
        return None
    ratio = top.sum() / bottom.sum()
    error = float((top - ratio * bottom).std(ddof=1) * len(top) ** 0.5 / bottom.sum())
    if named(metric).endswith("perplexity"):
        return error * math.exp(-ratio)
    return error / math.log(2.0) if named(metric) == "bits_per_byte" else error


def paired_difference(metric: str, a: Samples, b: Samples, resamples: int, seed: int) -> tuple[float, float, float]:
    """metric(a) - metric(b) over the same documents, with its 95 % percentile bootstrap interval.

    Documents are drawn with replacement, the same ones for both (Efron & Tibshirani 1993, chapter 13).

    Args:
        a, b: the samples of two models, in the same order of documents.

    Returns:
        difference, low, high. The interval is the difference itself where all documents agree, or where there is but
        one: no spread can be seen in one, so that `evaluate` reports no such pair.

    Raises:
        ValueError: the two were not measured on the same number of documents.
    """
    from scipy.stats import bootstrap  # large, and only evaluation needs it

    columns = [np.asarray(part, dtype=np.float64) for part in (*a, *b)]
    if len({len(column) for column in columns}) != 1 or not len(columns[0]):
        raise ValueError("paired samples need the same documents, at least one")

    def statistic(at: np.ndarray, ab: np.ndarray, bt: np.ndarray, bb: np.ndarray, axis: int = -1) -> np.ndarray:
        return value_of(metric, at.sum(axis), ab.sum(axis)) - value_of(metric, bt.sum(axis), bb.sum(axis))

    difference = float(statistic(columns[0], columns[1], columns[2], columns[3]))
    same = np.array_equal(columns[0], columns[2]) and np.array_equal(columns[1], columns[3])
    if same or len(columns[0]) < 2:
        return difference, difference, difference
    result = bootstrap(columns, statistic, paired=True, vectorized=True, n_resamples=resamples, batch=200,
                       method="percentile", rng=np.random.default_rng(seed))
    return difference, float(result.confidence_interval.low), float(result.confidence_interval.high)


def recovery(value: float, reference: float, higher_is_better: bool) -> float | None:
    """How much of the unquantized model's value is left, 1.0 is lossless; None where it is not defined. Errors that are
    gone, or that neither makes, are no loss."""
    if not higher_is_better and value == 0 <= reference:
        return 1.0
    top, bottom = (value, reference) if higher_is_better else (reference, value)
    return max(top, 0.0) / bottom if bottom > 0 else None
