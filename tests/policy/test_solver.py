"""The solver against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkquant.policy.solver import Option, efficient, fewest_bytes, least_loss

OPTIONS = st.builds(Option, bytes=st.integers(1, 40).map(lambda n: 96 * n),
                    loss=st.integers(0, 10**6).map(lambda n: n / 10**7))
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def everything(units: list[list[Option]]) -> list[tuple[int, float]]:
    return [(sum(option.bytes for option in pick), sum(option.loss for option in pick))
            for pick in itertools.product(*units)]


@settings(max_examples=15)
@given(UNITS, st.integers(96, 96 * 120))
def test_no_choice_within_the_bytes_loses_less(units: list[list[Option]], limit: int) -> None:
    allowed = [loss for size, loss in everything(units) if size <= limit]
    found = least_loss(units, limit)
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert found.bytes <= limit
    assert found.loss == pytest.approx(min(allowed), rel=1e-9, abs=1e-10)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.bytes == sum(unit[o].bytes for unit, o in zip(units, found.chosen, strict=True))
    assert least_loss(units, limit) == found


@settings(max_examples=15)
@given(UNITS, st.integers(0, 4 * 10**6))
def test_no_choice_within_the_loss_is_smaller(units: list[list[Option]], hundred_nanonats: int) -> None:
    ceiling = (hundred_nanonats + 0.5) / 10**7
    allowed = [size for size, loss in everything(units) if loss <= ceiling]
    found = fewest_bytes(units, ceiling)
    if not allowed:
        assert found is None
        return
    assert found is not None
    assert found.loss <= ceiling
    assert found.bytes == min(allowed)


def test_among_options_that_are_alike_the_first_is_taken() -> None:
    alike = [Option(10, 0.1), Option(10, 0.1), Option(20, 0.1), Option(5, 0.3)]
    found = least_loss([alike, alike], 20)
    assert found is not None
    assert found.chosen == (0, 0)


@settings(max_examples=30)
@given(UNITS)
def test_no_choice_within_the_bytes_of_an_efficient_one_loses_less(units: list[list[Option]]) -> None:
    everyone = everything(units)
    found = efficient(units)
    assert found[0].bytes == min(size for size, _ in everyone)
    assert found[-1].loss == pytest.approx(min(loss for _, loss in everyone))
    assert [one.bytes for one in found] == sorted({one.bytes for one in found})
    for one in found:
        assert one.loss == pytest.approx(min(loss for size, loss in everyone if size <= one.bytes), abs=1e-12)
        assert one.bytes == sum(unit[o].bytes for unit, o in zip(units, one.chosen, strict=True))
