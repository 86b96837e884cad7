"""The command line, run inside the tests' own process."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import SMALL, beginning

from sinkquant import cli


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["quantize-model", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def settings(text: Path, *more: str) -> list[str]:
    """--set options of a small run on a text of one's own."""
    return [part for assignment in (f"calibration.text={text}", f"evaluate.text={beginning(text)}", *SMALL, *more)
            for part in ("--set", assignment)]


def one_sentence(outcome: Outcome) -> str:
    """The error, after checking that it is the only line of its kind and no traceback."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("quantize-model: ")]
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert lines[0].endswith((".", ")"))
    return lines[0]
