"""A run as a list of stages: each makes some files of the run's folder from others that lie there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sinkquant.errors import SinkquantError
from sinkquant.models.steps import Progress
from sinkquant.run.folder import WorkFolder

LOG = logging.getLogger("sinkquant")


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: what it is timed and predicted as.
        inputs, outputs: names in the run's folder that it reads and makes. Where all outputs are there, an interrupted
            run has done it; without outputs it is always due.
        run: does it. cost: seconds that were predicted, 0 of a short one; None where nobody did.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[], object]
    cost: float | None = 0.0

    def done(self, work: WorkFolder) -> bool:
        """Whether an earlier attempt has left what it makes."""
        return bool(self.outputs) and all((work / name).exists() for name in self.outputs)


@dataclass
class TimeLeft:
    """What the stages to come will take: as predicted, times what those of this attempt took over their predictions.

    Attributes:
        due: seconds that were predicted of every stage to come; None of a long one that nobody has predicted.
    """

    measured: float = 0.0
    predicted: float = 0.0
    due: list[float | None] = field(default_factory=list)

    def seconds(self) -> float:
        """Seconds of all stages that are due; 0 where nobody knows."""
        if None in self.due:
            return 0.0
        return sum(one or 0.0 for one in self.due) * (self.measured / self.predicted if self.predicted > 0 else 1.0)

    def ended(self, cost: float | None, took: float) -> None:
        """The first stage that is due has ended."""
        self.due.pop(0)
        if cost:
            self.measured, self.predicted = self.measured + took, self.predicted + cost


def carry_out(stages: Sequence[Stage], work: WorkFolder, progress: Progress | None) -> None:
    """Run the stages whose outputs are not there yet, one after the other, with a line of progress for each.

    Raises:
        SinkquantError: what a stage reads is not there.
    """
    due = [stage for stage in stages if not stage.done(work)]
    left = TimeLeft(due=[stage.cost for stage in due])
    for number, stage in enumerate(due, 1):
        for name in stage.inputs:
            if not (work / name).exists():
                raise SinkquantError(f"{work.path} has lost {name}, which it takes to {stage.name}; start without "
                                     "--resume.")
        expected = f", {in_words(left.seconds())} left" if left.seconds() else ""
        label = f"{number} of {len(due)}: {stage.name}{expected}"
        if progress:
            progress(0, 1, label)
        before = work.seconds.get(stage.name, 0.0)
        with work.timed(stage.name):
            stage.run()
        left.ended(stage.cost, work.seconds[stage.name] - before)
        if progress:
            progress(1, 1, label)
        if number < len(due) and left.seconds():
            LOG.info("about %s left", in_words(left.seconds()))


def in_words(seconds: float) -> str:
    """"40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
