"""A run from disk to disk that is killed on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from sinkquant.formats import stream


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
