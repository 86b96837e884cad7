"""Differences of two candidates on the same documents and rows, and what is left of the unquantized model's values."""

from __future__ import annotations

from collections.abc import Sequence

from sinkquant.artifacts import Paired
from sinkquant.evaluate.candidate import BASELINE, PAIRS, Candidate
from sinkquant.evaluate.looks import interval
from sinkquant.evaluate.statistics import paired_difference, recovery
from sinkquant.recipe import Recipe

Recovered = dict[str, dict[str, dict[str, float]]]
"""By row, task and metric."""


def paired_differences(candidates: Sequence[Candidate], recipe: Recipe, level: float) -> list[Paired]:
    """Every pair of candidates in every metric that both have.

    Args:
        level: of the interval of the divergences: what the look spends that ended it.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    found = []
    for a, b in PAIRS:
        if a in by_name and b in by_name:
            found += [*_of_divergences(by_name[a], by_name[b], level), *_of_tasks(by_name[a], by_name[b], recipe)]
    return found


def _of_divergences(a: Candidate, b: Candidate, level: float) -> list[Paired]:
    if min(len(a.divergences), len(b.divergences)) < 2:
        return []  # not measured, or on one row, whose spread nobody knows
    found = interval([x - y for x, y in zip(a.divergences, b.divergences, strict=True)], level)
    return [Paired(task="divergence", metric="kl", a=a.name, b=b.name, difference=found.mean, low=found.low,
                   high=found.high, documents=len(a.divergences))]


def _of_tasks(a: Candidate, b: Candidate, recipe: Recipe) -> list[Paired]:
    found = []
    for task, result in a.tasks.items():
        for metric, samples in result.samples.items():
            other = b.tasks[task].samples.get(metric) if task in b.tasks else None
            if other is None or len(samples[0]) < 2:
                continue
            difference, low, high = paired_difference(metric, samples, other, recipe.evaluate.bootstrap, recipe.seed)
            found.append(Paired(task=task, metric=metric, a=a.name, b=b.name, difference=difference, low=low,
                                high=high, higher_is_better=result.higher_is_better[metric],
                                documents=len(samples[0])))
    return found


def recovered(candidates: Sequence[Candidate]) -> Recovered:
    """How much of the unquantized model's values is left; empty without it."""
    base = next((candidate for candidate in candidates if candidate.name == BASELINE), None)
    left: Recovered = {}
    for candidate in candidates if base is not None else []:
        for task, result in candidate.tasks.items() if candidate is not base else []:
            for metric, measure in result.measures.items():
                reference = base.tasks[task].measures.get(metric) if base and task in base.tasks else None
                share = recovery(measure.value, reference.value, result.higher_is_better[metric]) if reference else None
                if share is not None:
                    left.setdefault(candidate.name, {}).setdefault(task, {})[metric] = share
    return left
