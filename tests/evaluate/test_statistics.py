"""The paired bootstrap, standard errors and recovery, against closed forms and by their properties."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkquant.evaluate.statistics import Samples, paired_difference, recovery, standard_error, value_of

VALUES = st.lists(st.floats(0.001, 5.0), min_size=2, max_size=12)


def means(values: list[float]) -> Samples:
    return values, [1.0] * len(values)


@settings(max_examples=25, deadline=None)
@given(first=VALUES, seed=st.integers(0, 9))
def test_the_interval_is_ordered_covers_and_is_antisymmetric(first: list[float], seed: int) -> None:
    generator = random.Random(seed)
    a, b = means(first), means([value + generator.gauss(0.1, 0.2) for value in first])
    difference, low, high = paired_difference("kl", a, b, 300, seed)
    assert difference == pytest.approx(np.mean(a[0]) - np.mean(b[0]), abs=1e-12)
    every = [x - y for x, y in zip(a[0], b[0], strict=True)]
    assert min(every) - 1e-9 <= low <= high <= max(every) + 1e-9
    other, other_low, other_high = paired_difference("kl", b, a, 300, seed)
    assert (other, other_low, other_high) == pytest.approx((-difference, -high, -low), abs=1e-9)
    assert (difference, low, high) == paired_difference("kl", a, b, 300, seed)


@pytest.mark.parametrize("metric", ["acc", "word_perplexity", "bits_per_byte"])
def test_equal_rows_differ_by_nothing(metric: str) -> None:
    samples: Samples = ([-30.0, -21.0, -40.0], [10.0, 8.0, 12.0])
    assert paired_difference(metric, samples, samples, 200, 0) == (0.0, 0.0, 0.0)


def test_a_constant_difference_has_no_spread() -> None:
    found = paired_difference("kl", means([0.2, 0.3, 0.7]), means([0.1, 0.2, 0.6]), 200, 0)
    assert found == pytest.approx((0.1, 0.1, 0.1))


def test_one_document_gives_the_difference_alone() -> None:
    assert paired_difference("kl", means([2.0]), means([0.5]), 200, 0) == (1.5, 1.5, 1.5)


def test_unequal_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="same documents"):
        paired_difference("kl", means([1.0, 2.0]), means([1.0]), 200, 0)


def test_perplexity_is_a_ratio_of_sums_and_its_difference_is_paired() -> None:
    generator = random.Random(0)
    words = [float(generator.randint(50, 500)) for _ in range(60)]
    base = [-w * generator.gauss(5.0, 0.8) for w in words]
    worse = [value - w * generator.gauss(0.02, 0.01) for value, w in zip(base, words, strict=True)]
    difference, low, high = paired_difference("word_perplexity", (worse, words), (base, words), 1000, 0)
    expected = math.exp(-sum(worse) / sum(words)) - math.exp(-sum(base) / sum(words))
    assert difference == pytest.approx(expected)
    assert 0 < low < difference < high
    # Paired: the interval is far narrower than the standard error of either perplexity.
    assert high - low < standard_error("word_perplexity", (base, words)) / 2


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(150):
        base = generator.normal(1.0, 0.5, 40)
        other = base + generator.normal(0.1, 0.2, 40)
        _, low, high = paired_difference("kl", means(other.tolist()), means(base.tolist()), 300, trial)
        hits += low <= 0.1 <= high
    assert 0.87 <= hits / 150 <= 0.99


def test_standard_errors_against_closed_form_and_bootstrap() -> None:
    assert standard_error("acc", means([1.0, 0.0, 1.0, 1.0])) == pytest.approx(0.25)
    assert standard_error("acc", means([1.0])) is None
    generator = np.random.default_rng(1)
    words = generator.integers(50, 500, 80).astype(float)
    scores = -words * generator.normal(4.0, 0.4, 80)
    draws = generator.integers(0, 80, (4000, 80))
    for metric in ("word_perplexity", "bits_per_byte"):
        spread = value_of(metric, scores[draws].sum(1), words[draws].sum(1)).std()
        assert standard_error(metric, (scores.tolist(), words.tolist())) == pytest.approx(spread, rel=0.1)


def test_recovery_is_one_where_nothing_is_lost() -> None:
    assert recovery(0.6, 0.8, True) == pytest.approx(0.75)
    assert recovery(0.0, 0.8, True) == 0.0
    assert recovery(20.0, 10.0, False) == pytest.approx(0.5)
    assert recovery(0.5, 0.0, True) is None
    assert recovery(0.0, 0.02, False) == recovery(0.0, 0.0, False) == 1.0
    assert recovery(0.0, -1.0, False) is None


def test_a_filter_does_not_change_what_a_metric_is() -> None:
    samples = ([-1.0, -2.0, -1.5], [1.0, 1.0, 1.0])
    for metric in ("perplexity", "bits_per_byte", "acc"):
        assert value_of(f"{metric},mine", -4.5, 3.0) == value_of(metric, -4.5, 3.0)
        assert standard_error(f"{metric},mine", samples) == standard_error(metric, samples)


@pytest.mark.parametrize(("value", "reference"), [(-0.06, -0.02), (0.05, -0.02), (0.3, 0.0)])
def test_there_is_no_recovery_of_what_is_not_positive(value: float, reference: float) -> None:
    assert recovery(value, reference, True) is None


def test_nothing_is_left_of_a_correlation_that_turned() -> None:
    assert recovery(-0.3, 0.5, True) == 0.0
