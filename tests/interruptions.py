"""Jobs that are killed on their way, and disks that are full."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import quantized
from tiny_tokenizer import tiny_tokenizer

from sinkquant.artifacts import Plan
from sinkquant.errors import SinkquantError
from sinkquant.formats import quantize_to, save, stream
from sinkquant.models import load_tokenizer, open_model


class Killed(BaseException):
    """Stands for SIGKILL where starting a process for it would take long."""


@contextlib.contextmanager
def killed(calls: int, place: str = "_write_block") -> Iterator[None]:
    """Let the function `place` of the stream work so many times; the next call must end what stands in the context."""
    real, left = getattr(stream, place), [calls]

    def once(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, place, once)
        with pytest.raises(Killed):
            yield


def dies(source: Path, plan: Path, target: Path, place: str, calls: int) -> None:
    """A program: carry out a plan, and die of SIGKILL at the call of `place` after so many."""
    real, left = getattr(stream, place), [calls]

    def once(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(stream, place, once)
    quantize_to(target, open_model(source), Plan.load(plan), load_tokenizer(source))


def fills(work: Path, text: Path, limits: list[int]) -> None:
    """A program: save one model again and again, on file systems that hold more and more."""
    model = quantized(text)[0]
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(model, tiny_tokenizer(), work / "out")
            print(limit, "saved")
        except SinkquantError as error:
            print(limit, error.exit_code, str(error).count("\n"), str(error).startswith("cannot write"))
        print(sorted(path.name for path in work.iterdir()))
