"""One option for every unit, with the least loss under a limit of bytes, or the fewest bytes under a limit of loss:
the multiple-choice knapsack, solved exactly as a mixed-integer program by HiGHS (scipy.optimize.milp)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NODES = 200_000
"""Branches that HiGHS may look at; counted, not timed, so that two runs give the same plan."""
RESOLUTION = 1e4
"""Losses are scaled so that the largest is this: HiGHS' tolerances are absolute, 1e-6, and bytes are whole numbers."""
ROUNDS = 6
"""How often a limit is solved for again because what the options do not tell, a longer header of the files or the mean
of a cache over lengths, took the solution over it."""

Options = Sequence[Sequence["Option"]]


@dataclass(frozen=True)
class Option:
    """One way to store one unit: bytes, and loss in nats per token."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """The option of every unit, what they cost together, and how far below it the optimum may lie, as a share of it."""

    chosen: tuple[int, ...]
    bytes: int
    loss: float
    gap: float


def least_loss(units: Options, limit: int) -> Solution | None:
    """The least loss that `limit` bytes allow; None where even the smallest options are larger."""
    if sum(min(option.bytes for option in unit) for unit in units) > limit:
        return None
    sizes, unit_of_size = _whole(units)
    losses, _ = _scaled(units)
    room = (limit - sum(min(option.bytes for option in unit) for unit in units)) // unit_of_size
    return _solve(units, losses, sizes, float(room))


def fewest_bytes(units: Options, ceiling: float) -> Solution | None:
    """The fewest bytes whose loss is at most `ceiling` nats per token; None where even the best options lose more."""
    least = sum(min(option.loss for option in unit) for unit in units)
    if least > ceiling:
        return None
    sizes, _ = _whole(units)
    losses, largest = _scaled(units)
    return _solve(units, sizes, losses, (ceiling - least) / largest * RESOLUTION)


def efficient(units: Options) -> list[Solution]:
    """All solutions of the relaxed problem, in which options may be mixed, that need no mixing: from the smallest
    options on, the step that saves most loss per byte first. Each is the least loss for its bytes, and no more than
    one step away from the next, so that a sweep of budgets takes no solver."""
    steps, chosen = [], []
    for index, unit in enumerate(units):
        hull = _hull(unit)
        chosen.append(hull[0])
        steps += [((unit[one].loss - unit[other].loss) / (unit[other].bytes - unit[one].bytes), index, other)
                  for one, other in itertools.pairwise(hull)]
    found = [_of(units, chosen, 0.0)]
    for _, index, option in sorted(steps, key=lambda step: -step[0]):  # stable: a unit's own steps stay in order
        chosen[index] = option
        found.append(_of(units, chosen, 0.0))
    return found


def _hull(unit: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull of loss over bytes, by bytes ascending."""
    kept: list[int] = []
    for option in _undominated([o.loss for o in unit], [float(o.bytes) for o in unit]):
        while len(kept) > 1 and _slope(unit, kept[-2], kept[-1]) >= _slope(unit, kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(unit: Sequence[Option], one: int, other: int) -> float:
    return (unit[other].loss - unit[one].loss) / (unit[other].bytes - unit[one].bytes)


def _of(units: Options, chosen: Sequence[int], gap: float) -> Solution:
    return Solution(tuple(chosen), sum(unit[o].bytes for unit, o in zip(units, chosen, strict=True)),
                    sum(unit[o].loss for unit, o in zip(units, chosen, strict=True)), gap)


def _whole(units: Options) -> tuple[list[list[float]], int]:
    """Bytes above the smallest option of each unit, in the largest unit that leaves them whole."""
    above = [[option.bytes - min(o.bytes for o in unit) for option in unit] for unit in units]
    size = math.gcd(*(value for values in above for value in values)) or 1
    return [[float(value // size) for value in values] for values in above], size


def _scaled(units: Options) -> tuple[list[list[float]], float]:
    """Losses above the least of each unit, the largest being RESOLUTION; and what that one is in nats."""
    above = [[option.loss - min(o.loss for o in unit) for option in unit] for unit in units]
    largest = max((value for values in above for value in values), default=0.0) or 1.0
    return [[value / largest * RESOLUTION for value in values] for values in above], largest


def _solve(units: Options, costs: list[list[float]], weights: list[list[float]], limit: float) -> Solution:
    """Minimize the sum of costs, the sum of weights being at most `limit`. Feasible by the caller's word."""
    kept = [_undominated(cost, weight) for cost, weight in zip(costs, weights, strict=True)]
    chosen, gap = [options[-1] for options in kept], 0.0  # the cheapest of each: optimal where there is room for it
    if sum(weights[unit][option] for unit, option in enumerate(chosen)) > limit:
        from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which only a tight budget needs
        from scipy.sparse import coo_array

        places = [(unit, option) for unit, options in enumerate(kept) for option in options]
        owner = np.array([unit for unit, _ in places])
        cost = np.array([costs[unit][option] for unit, option in places])
        weight = np.array([weights[unit][option] for unit, option in places])
        one_each = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner))))).tocsr()
        found = milp(cost, integrality=np.ones(len(owner)), bounds=Bounds(0, 1),
                     constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, limit)],
                     options={"mip_rel_gap": 0.0, "node_limit": NODES})
        if found.x is None:  # the branches ran out before any solution: the lightest options are one
            chosen, gap = [options[0] for options in kept], 1.0
        else:
            chosen = [options[int(np.argmax(found.x[owner == unit]))] for unit, options in enumerate(kept)]
            gap = float(found.mip_gap or 0.0)
    return _of(units, chosen, gap)


def _undominated(costs: list[float], weights: list[float]) -> list[int]:
    """Options that no other beats in both, by weight ascending; of those that are alike the first. Some optimum takes
    no other one."""
    kept: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (weights[o], costs[o], o)):
        if not kept or costs[option] < costs[kept[-1]]:
            kept.append(option)
    return kept
