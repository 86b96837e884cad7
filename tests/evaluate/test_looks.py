"""The stopping rule: what it spends, what it stops at, and how often it errs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from sinkquant.evaluate.looks import ERROR, Look, interval, known, looks, settled

TRIALS = 2000


def test_looks_double_and_spend_little_of_the_error_early() -> None:
    assert [look.rows for look in looks(64, 0.05)] == [8, 16, 32, 64]
    assert [look.level * 512 / ERROR for look in looks(64, 0.05)] == pytest.approx([1, 7, 56, 448])
    assert [look.rows for look in looks(50, 0.05)] == [13, 25, 50]
    first = (9 / 17) ** 3
    assert [look.level for look in looks(17, 0.05)] == pytest.approx([ERROR * first, ERROR * (1 - first)])
    for total in (1, 2, 15):
        assert looks(total, 0.05) == [Look(total, ERROR)]
    assert looks(64, None) == [Look(64, ERROR)]
    for total in range(16, 200):
        plan = looks(total, 0.1)
        assert sum(look.level for look in plan) == pytest.approx(ERROR)
        assert plan[0].rows >= 8
        assert plan[-1].rows == total


def test_the_interval_is_students_where_values_are_not_skewed() -> None:
    values = np.random.default_rng(0).normal(0, 2, 10)
    values = np.concatenate([1 + values, 1 - values])
    found = interval(list(values), 0.05)
    reference = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.mean == pytest.approx(values.mean())
    half = found.high - found.mean
    assert half / float(t.ppf(0.975, 19)) == pytest.approx(values.std(ddof=1) / 20 ** 0.5)
    assert interval([3.0, 3.0], 0.01) == interval([3.0] * 9, 0.5)
    with pytest.raises(ValueError, match="two values"):
        interval([1.0], 0.05)


def test_the_interval_reaches_further_on_the_side_of_the_tail() -> None:
    values = np.random.default_rng(0).lognormal(0, 1, 20)
    found, reach = interval(list(values), 0.05), float(t.ppf(0.975, 19))
    mean, deviation = values.mean(), values.std(ddof=1)
    skew, root = ((values - mean) ** 3).mean() / deviation ** 3, 20 ** 0.5
    assert found.low == pytest.approx(mean - reach * deviation / root)
    assert found.high > mean + reach * deviation / root
    end = (mean - found.high) / deviation * root  # Hall's transformation takes the upper end to Student's quantile
    assert end + skew / root / 3 * end ** 2 + skew ** 2 / 20 / 27 * end ** 3 + skew / root / 6 == pytest.approx(-reach)


def test_what_is_settled() -> None:
    base = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.05, 0.95]
    up = [value + 0.2 + 0.01 * (-1) ** i for i, value in enumerate(base)]
    assert settled(up, base, 0.01, 0.0001)  # the sign is certain
    assert settled(base, up, 0.01, 0.0001)
    near = [value + 0.02 * (-1) ** i for i, value in enumerate(base)]
    assert settled(near, base, 0.01, 0.05)  # no sign, and known to 5 %
    assert not settled(near, base, 0.01, 0.005)
    assert settled(base, base, 0.01, 0.001)  # nothing differs
    assert known(base, 0.05, 0.2)
    assert not known(base, 0.05, 0.01)
    assert known(base, 0.05, 0.01, bound=2.0)
    assert known(base, 0.05, 0.01, bound=0.5)
    assert not known(base, 0.05, 0.5, bound=1.01)


def test_the_error_rate_holds_on_skewed_differences() -> None:
    """Two models that are as good as each other, on rows whose divergences are lognormal and alike: a verdict is wrong
    in no more than 5 % of evaluations, with three standard errors of the simulation on top."""
    generator = np.random.default_rng(1)
    wrong = stopped = 0
    for _ in range(TRIALS):
        rows = np.exp(generator.normal(0, 0.6, 64))
        a, b = (rows * np.exp(generator.normal(0, 0.2, 64)) for _ in range(2))
        for look in looks(64, 0.01):
            found = interval(list(a[:look.rows] - b[:look.rows]), look.level)
            if found.certain:
                wrong += 1
                stopped += look.rows < 64
                break
    assert wrong / TRIALS <= ERROR + 3 * (ERROR * (1 - ERROR) / TRIALS) ** 0.5
    assert wrong > stopped > 0  # the rule can err, early too


def test_verdicts_agree_with_all_rows() -> None:
    """Where a difference is there, fewer rows find the sign that all of them have, with half of the rows or less."""
    generator = np.random.default_rng(2)
    used = []
    for _ in range(200):
        b = np.exp(generator.normal(-5, 0.4, 64))
        a = b * np.exp(generator.normal(0.12, 0.1, 64))
        full = interval(list(a - b), ERROR)
        for look in looks(64, 0.01):
            if settled(list(a[:look.rows]), list(b[:look.rows]), look.level, 0.01):
                break
        found = interval(list(a[:look.rows] - b[:look.rows]), look.level)
        assert full.low > 0
        assert found.low > 0
        used.append(look.rows)
    assert np.mean(used) < 32
