"""Refinement: gradient descent on codes and scales that a method has chosen.

What is lowered is an `Objective`: what a block gives, or what the whole model predicts. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from sinkquant.schemes.codecs.packed import PackedWeight

ROWS = 4
"""Calibration rows of an iteration."""


class Tuned(Protocol):
    """What gradients change of one linear: its codes and scales (`Offsets`), or its scales alone (`Scales`)."""

    packed: PackedWeight
    """What it starts from."""

    @staticmethod
    def rate(iterations: int) -> float:
        """Of the first of so many steps; the last ones go towards nothing."""

    def now(self) -> PackedWeight:
        """What would be stored of it now."""

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step down. gradient: of the dense weight that `now` gives, float [rows, columns]."""


class Objective(Protocol):
    """A loss over calibration rows, as a function of the weights of some linears."""

    @property
    def rows(self) -> int:
        """The number of calibration rows."""

    def put(self, name: str, packed: PackedWeight) -> None:
        """Compute with this weight from now on."""

    def gradients(self, chosen: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Of the loss over some rows (int64), to every dense weight, [rows, columns]; one that no token came by is
        missing."""

    def loss(self) -> float:
        """Over all rows."""


@dataclass(frozen=True)
class Refined:
    """What refinement gives: the weights, those that came where the loss over all rows did not fall, and that loss
    before and after."""

    weights: dict[str, PackedWeight]
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether the tuned weights are kept."""
        return self.after < self.before


def refine(tuned: Mapping[str, Tuned], objective: Objective, iterations: int, seed: int,
           progress: Callable[[int], None] | None = None) -> Refined:
    """Tune the codes and scales of some linears together; the objective holds what is returned.

    Args:
        tuned: module name -> codes and scales to start from.
        seed: of the rows that every iteration takes.
        progress: is told after every iteration how many are done.
    """
    start = {name: one.packed for name, one in tuned.items()}
    _put_all(objective, start)
    before = objective.loss()
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(iterations):
        left = 1 - iteration / iterations
        chosen = torch.randperm(objective.rows, generator=generator)[:ROWS]
        for name, gradient in objective.gradients(chosen).items():
            tuned[name].step(gradient, tuned[name].rate(iterations) * left)
            objective.put(name, tuned[name].now())
        if progress:
            progress(iteration + 1)
    found = {name: one.now() for name, one in tuned.items()}
    _put_all(objective, found)
    refined = Refined(found, before, objective.loss())
    if refined.better:
        return refined
    _put_all(objective, start)
    return Refined(start, before, refined.after)


def _put_all(objective: Objective, weights: Mapping[str, PackedWeight]) -> None:
    for name, packed in weights.items():
        objective.put(name, packed)
