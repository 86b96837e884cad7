"""Divergence of all candidates on the same rows, as many as the verdicts need."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from sinkquant.errors import SinkquantError
from sinkquant.evaluate.candidate import BASELINE, DECIDED, Candidate
from sinkquant.evaluate.divergence import BATCH_ROWS, Reader, compare_side_by_side
from sinkquant.evaluate.looks import Look, known, looks, settled
from sinkquant.evaluate.shelf import Shelf
from sinkquant.evaluate.states import last_states
from sinkquant.evaluate.verdict import RESULTS
from sinkquant.models.loading import all_finite
from sinkquant.models.processes import shared
from sinkquant.recipe import Recipe


def measure_divergences(candidates: Sequence[Candidate], shelf: Shelf, rows: torch.Tensor, recipe: Recipe,
                        next_step: Callable[[str], None]) -> Look:
    """Fill the `divergences` of all candidates but the unquantized one, which is among them.

    Args:
        rows: int64 [rows, length]; they are taken in an order drawn by the recipe's seed.
        next_step: is told what begins.

    Returns:
        the last look that was taken.
    """
    base = next(candidate for candidate in candidates if candidate.name == BASELINE)
    others = [candidate for candidate in candidates if candidate is not base]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))]
    plan = looks(len(rows), recipe.evaluate.precision)
    seen = 0
    for look in plan:
        next_step(f"divergence, rows {seen + 1} to {look.rows}")
        here = rows[seen:look.rows]
        figures = shared(range(len(here)), functools.partial(_one_look, base, others, shelf, here))
        for place, candidate in enumerate(others):
            if not all(math.isfinite(row[place][0]) for row in figures):
                raise _overflows(candidate)
            candidate.divergences += [row[place][0] for row in figures]
            candidate.by_position += [row[place][1:] for row in figures]
        seen = look.rows
        if look is plan[-1] or _decided(others, look, recipe):
            break
    return look


def _one_look(base: Candidate, others: Sequence[Candidate], shelf: Shelf, rows: torch.Tensor,
              mine: list[int]) -> list[list[list[float]]]:
    """By row of `mine`, of every candidate the divergence and then that of every bin of positions.

    As many models side by side as there is room for: the unquantized model's blocks run once for all of them, its head
    once for each set of models.
    """
    baseline = shelf.get(base.load)
    batches = rows[mine].split(BATCH_ROWS)
    states = [last_states(baseline, batch) for batch in batches]
    if not all(map(all_finite, states)):
        raise _overflows(base)
    found: list[list[list[float]]] = []
    for group in _groups(base, others, shelf.beside_the_first):
        readers: list[Reader] = [(shelf.get(candidate.load), candidate.kv) for candidate in group]
        found += [[[kl, *bins] for kl, bins in zip(one.kl, one.by_position, strict=True)]
                  for one in compare_side_by_side(baseline, states, readers, batches)]
        del readers  # before the next ones are loaded
    return [list(row) for row in zip(*found, strict=True)]


def _overflows(candidate: Candidate) -> SinkquantError:
    return SinkquantError(f"what {candidate.name} ({candidate.path}) predicts is not finite: its weights, or what they "
                          "make of this text, overflow; compute in float32 (compute.dtype), or look at its weights.")


def _groups(base: Candidate, others: Sequence[Candidate], room: int) -> list[list[Candidate]]:
    """Candidates in their order, in sets that need so many models at most beside the unquantized one."""
    groups: list[list[Candidate]] = [[]]
    for candidate in others:
        loads = {one.load for one in (*groups[-1], candidate)} - {base.load}
        if len(loads) > room:
            groups.append([])
        groups[-1].append(candidate)
    return groups


def _decided(others: Sequence[Candidate], look: Look, recipe: Recipe) -> bool:
    """Whether no verdict would change with more rows: every pair that is compared is settled, the rows that stand alone
    are known to the recipe's precision, and on which side of the gate the result is."""
    precision = recipe.evaluate.precision
    assert precision is not None
    by_name = {candidate.name: candidate.divergences for candidate in others}
    pairs = [(a, b) for a, b in DECIDED if a in by_name and b in by_name]
    alone = set(by_name) - {name for pair in pairs for name in pair}
    bound, result = recipe.gate.max_divergence, next((name for name in RESULTS if name in by_name), None)
    return (all(settled(by_name[a], by_name[b], look.level, precision) for a, b in pairs)
            and all(known(by_name[name], look.level, precision) for name in alone)
            and (bound is None or result is None or known(by_name[result], look.level, precision, bound)))

