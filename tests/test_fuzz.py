"""The first inputs of every fuzzer: whoever reads a user's file or value does so, or says why not in a sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzzer import TARGETS, Fixtures, Tally, odd_json, tried

INPUTS = 12


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    return Fixtures.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_crashes(target: str, given: Fixtures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkquant.models.kept.cached_assets_path", lambda *_, **__: tmp_path / "assets")
    tally = Tally()
    for seed in range(INPUTS):
        tried(TARGETS[target], seed, given, tally)
    assert tally.crashes == {}
    assert tally.refused > 0
    assert not list((tmp_path / "assets").glob(".*"))


def test_a_crash_is_told_from_a_refusal(given: Fixtures) -> None:
    tally = Tally()

    def breaks(rng: object, given: Fixtures) -> None:
        raise KeyError("x")

    tried(breaks, 7, given, tally)
    assert (tally.inputs, tally.refused, list(tally.crashes.values())) == (1, 0, [7])


def test_odd_json_is_another_value() -> None:
    value = {"a": [1, 2, {"b": None}], "c": "text"}
    changed = [odd_json(random.Random(seed), value) for seed in range(50)]
    assert sum(one != value for one in changed) >= 45
    assert value == {"a": [1, 2, {"b": None}], "c": "text"}
