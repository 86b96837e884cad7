"""Progress of work that is a number of steps."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, label)."""


class Steps:
    """Counts steps for a bar: `next` ends the one that runs and begins another.

    Args:
        total: as many as are expected; more may come.
        doing, done: what is said in front of a step's label, and at the end.
    """

    def __init__(self, total: int, progress: Progress | None, doing: str, done: str) -> None:
        self.total, self.progress, self.doing, self.done, self.begun = total, progress, doing, done, 0

    def next(self, label: str) -> None:
        if self.progress:
            self.progress(self.begun, max(self.total, self.begun + 1), f"{self.doing} {label}")
        self.begun += 1

    def end(self) -> None:
        """All is done, whether it took all steps or not."""
        if self.progress:
            self.progress(self.total, self.total, self.done)
