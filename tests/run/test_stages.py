"""A run is a list of stages: what is there is not made again, what is lost is named, and the time left is what this run
has measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from sinkquant.errors import SinkquantError
from sinkquant.predict import Prediction
from sinkquant.recipe import Recipe
from sinkquant.run import job
from sinkquant.run.folder import WorkFolder
from sinkquant.run.stages import Stage, TimeLeft, carry_out, in_words


def writing(work: WorkFolder, name: str, said: list[str]) -> Callable[[], object]:
    def write() -> None:
        said.append(name)
        (work / name).write_text(name)

    return write


def test_stages_whose_outputs_are_there_are_not_run_again(tmp_path: Path) -> None:
    work, ran = WorkFolder(tmp_path, "key"), []
    shown: list[tuple[int, int, str]] = []

    def stages() -> list[Stage]:
        return [Stage("first", (), ("a",), writing(work, "a", ran), 10.0),
                Stage("second", ("a",), ("b",), writing(work, "b", ran), 30.0),
                Stage("always", ("b",), (), lambda: ran.append("always"))]

    carry_out(stages(), work, lambda *step: shown.append(step))
    assert ran == ["a", "b", "always"]
    assert list(work.seconds) == ["first", "second", "always"]
    assert shown[0] == (0, 1, "1 of 3: first, 40 s left")
    assert shown[1] == (1, 1, shown[0][2])
    assert shown[-1] == (1, 1, "3 of 3: always")
    (tmp_path / "b").unlink()
    carry_out(stages(), work, None)
    assert ran == ["a", "b", "always", "b", "always"]


def test_an_input_that_is_lost_is_named(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path, "key")
    with pytest.raises(SinkquantError, match=r"has lost plan\.json, which it takes to quantize; start"):
        carry_out([Stage("quantize", ("plan.json",), ("model",), lambda: time.sleep(0))], work, None)


def test_the_time_left_follows_what_this_run_took() -> None:
    left = TimeLeft(due=[10.0, 0.0, 20.0, 40.0])
    assert left.seconds() == 70
    left.ended(10.0, 30.0)  # three times slower than predicted
    assert left.seconds() == 180
    left.ended(0.0, 50.0)  # a short one says nothing of the pace
    assert left.seconds() == 180
    left.ended(20.0, 30.0)
    assert left.seconds() == 80
    left = TimeLeft(due=[10.0, None, 20.0])
    assert left.seconds() == 0  # a long stage that nobody predicted is to come
    left.ended(10.0, 30.0)
    left.ended(None, 500.0)
    assert left.seconds() == 60
    assert [in_words(seconds) for seconds in (40.2, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_processes_that_wait_are_dismissed_where_an_earlier_attempt_has_evaluated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dismissed: list[bool] = []
    monkeypatch.setattr(job, "dismiss", lambda: dismissed.append(True))
    monkeypatch.setattr(job, "carry_out", lambda *_: None)
    monkeypatch.setattr(job.Report, "load", lambda _: None)
    resumed = job.Job(Recipe(), "tiny", tmp_path, tiny_tokenizer(), WorkFolder(tmp_path, ""), False, None,
                      Prediction({}), None)
    resumed.run(None, False)
    assert not dismissed  # the stage that evaluates does it
    (tmp_path / "report.json").touch()
    resumed.run(None, False)
    assert dismissed == [True]
