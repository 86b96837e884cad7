"""Models -> Report: every row on the same documents, beside the unquantized model and the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Measure, Report, Row, SinkFidelity
from sinkquant.artifacts.report import Fidelity
from sinkquant.errors import RequestError
from sinkquant.evaluate.adaptive import measure_divergences
from sinkquant.evaluate.candidate import BASELINE, Candidate
from sinkquant.evaluate.divergence import held_out_rows, require_vocabulary
from sinkquant.evaluate.generation import continued_rows, generating, measure_generation, require_room
from sinkquant.evaluate.looks import ERROR, Look, looks
from sinkquant.evaluate.pairs import paired_differences, recovered
from sinkquant.evaluate.positions import named
from sinkquant.evaluate.shelf import Shelf, room
from sinkquant.evaluate.statistics import standard_error
from sinkquant.evaluate.task_files import WantedTasks, wanted_tasks
from sinkquant.evaluate.tasks import ready_tasks
from sinkquant.evaluate.verdict import judge
from sinkquant.models import encode, max_length, read_text, starts_with_bos, vocabulary_of
from sinkquant.models.corpus import in_words
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress, Steps
from sinkquant.recipe import Recipe

Compare = Callable[[PreTrainedModel, PreTrainedModel], SinkFidelity]
Facts = dict[str, str | int | float | bool | None]
FILL = 0.85
"""Share of a context that items are made for: passages differ in how many tokens a character takes."""


@own_numerics()
def evaluate(candidates: list[Candidate], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, model: str,
             fidelity: Fidelity | None = None, compare: Compare | None = None,
             progress: Progress | None = None) -> Report:
    """Measure the candidates and compare them in pairs.

    The candidate named "unquantized", where there is one, is the baseline of divergence and recovery.

    Args:
        model: name of the model, for the report.
        fidelity: sink rates and massive activations of the rows, measured by the caller.
        compare: is called with the baseline and every other model while both are loaded; what it finds goes into
            the report's fidelity.
        progress: is called with (steps done, steps, label); a step is one task of one candidate, or the divergence of
            all of them on some rows.

    Raises:
        RequestError: no candidates or two of one name; the evaluation text is too short; a task cannot be had.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"evaluation needs candidates with names of their own, not {names}.")
    settings = recipe.evaluate
    wanted = wanted_tasks(settings)
    bos = starts_with_bos(tokenizer, recipe.calibration.bos)
    content = read_text(settings.text, "evaluation", tokenizer)
    ordered = sorted(candidates, key=lambda candidate: candidate.name != BASELINE)
    shelf = Shelf(room(recipe))
    first = shelf.get(ordered[0].load)
    limit = max_length(first) - max(len(c.kv.front) if c.kv else 0 for c in candidates)
    vocabulary = vocabulary_of(first)
    rows, fitting = _rows(tokenizer, content, recipe, limit, vocabulary)
    del first
    diverging = ordered[0].name == BASELINE and len(ordered) > 1
    plan = looks(len(rows), settings.precision) if diverging else []
    written = generating(ordered) if settings.generation_rows else []
    steps = Steps(sum(len(wanted.names) for candidate in candidates if candidate.tasks_too) + len(plan) + len(written),
                  progress, "evaluating", "evaluated")
    with ready_tasks(settings.text, content, wanted.names, recipe.seed, fitting) as folder:
        comparisons, available = _run_tasks(ordered, shelf, tokenizer, recipe, wanted, folder, bos, vocabulary,
                                              compare, steps)
    look = Look(len(rows), ERROR)
    if diverging:
        look = measure_divergences(ordered, shelf, rows, recipe, steps.next)
    if written:
        measure_generation(ordered, shelf, tokenizer, content, recipe, steps.next)
    steps.end()
    if comparisons:
        fidelity = fidelity or Fidelity(sink_rate={}, massive_peak={}, massive_ratio={})
        fidelity = fidelity.model_copy(update={"comparisons": comparisons})
    found = [_row(candidate, rows.shape[1]) for candidate in candidates]
    paired = paired_differences(candidates, recipe, look.level)
    left = recovered(candidates)
    facts: Facts = {
        "text": in_words(settings.text) or "packaged evaluation text", "rows": look.rows, "rows available": len(rows),
        "length": rows.shape[1], "rows_start_with_bos": bos, "seed": recipe.seed, "limit": settings.limit,
        "sample": settings.sample if settings.limit is None else None, "precision": settings.precision,
        "window": settings.window, "dtype": recipe.compute.dtype, "generation_rows": settings.generation_rows or None,
        "bootstrap_resamples": settings.bootstrap}
    facts |= {f"documents: {task}": result.documents for task, result in candidates[0].tasks.items()}
    facts |= {f"documents available: {task}": count for task, count in available.items()}
    return Report(model=model, recipe=recipe.name, rows=found, paired=paired, recovery=left, fidelity=fidelity,
                  verdict=judge(found, paired, left, fidelity, recipe.gate), evaluation=facts,
                  notes=_notes(look, len(rows), plan, settings.precision))


def _run_tasks(ordered: Sequence[Candidate], shelf: Shelf, tokenizer: PreTrainedTokenizerBase, recipe: Recipe,
               wanted: WantedTasks, folder: Path, bos: bool, vocabulary: int, compare: Compare | None,
               steps: Steps) -> tuple[dict[str, SinkFidelity], dict[str, int]]:
    """Fill the candidates' `tasks`. Returns the sink fidelity of each, and how many documents every task has."""
    from sinkquant.evaluate.run import open_tasks, score_tasks  # lm-eval takes 130 MB, which all else does without

    settings = recipe.evaluate
    opened = open_tasks(wanted.names, folder, wanted.folder)
    comparisons: dict[str, SinkFidelity] = {}
    for candidate in ordered:
        if not candidate.tasks_too:
            continue
        loaded = shelf.get(candidate.load)
        require_vocabulary(loaded, candidate.path, vocabulary)
        for task in wanted.names:
            steps.next(f"{candidate.name}: {task}")
            candidate.tasks |= score_tasks(loaded, tokenizer, opened, [task], bos=bos, limit=settings.limit,
                                           sample=settings.sample, batch_size=settings.batch_size, seed=recipe.seed,
                                           kv=candidate.kv, window=settings.window)
        if compare is not None and ordered[0].name == BASELINE and candidate is not ordered[0]:
            comparisons[candidate.name] = compare(shelf.get(ordered[0].load), loaded)
        del loaded  # before the next one is loaded
    return comparisons, opened.documents


def _notes(look: Look, total: int, plan: Sequence[Look], precision: float | None) -> list[str]:
    if len(plan) < 2:
        return []
    ends = ("every verdict was certain, or its difference known to "
            f"{precision:.0%} of the divergence" if look.rows < total else "some difference was neither certain nor "
            f"known to {precision:.0%} of the divergence before")
    return [f"divergence was measured on {look.rows} of {total} rows: {ends}; intervals hold for all looks together"]


def require_rows(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, limit: int, vocabulary: int) -> None:
    """Refuse an evaluation for which the model has too few positions, or the text too few tokens.

    Args:
        limit: positions of the model. vocabulary: its ids.

    Raises:
        RequestError: one of these.
    """
    settings = recipe.evaluate
    content = read_text(settings.text, "evaluation", tokenizer)
    _, fitting = _rows(tokenizer, content, recipe, limit, vocabulary)
    if settings.generation_rows and recipe.kv_cache is not None:
        continued_rows(vocabulary, tokenizer, content, recipe)
    with ready_tasks(settings.text, content, wanted_tasks(settings).names, recipe.seed, fitting):
        pass


def _rows(tokenizer: PreTrainedTokenizerBase, content: str, recipe: Recipe, limit: int,
          vocabulary: int) -> tuple[torch.Tensor, int]:
    """The rows that models are compared on, int64 [rows, length], and how many characters a task's item may have."""
    require_room(recipe, limit)
    return (held_out_rows(vocabulary, tokenizer, content, recipe, limit),
            fitting_characters(tokenizer, content, min(limit, recipe.evaluate.window)))


def fitting_characters(tokenizer: PreTrainedTokenizerBase, content: str, limit: int) -> int:
    """How many characters of this text surely fit into a context of `limit` tokens."""
    sample = content[:50_000]
    return int(FILL * limit * len(sample) / max(1, len(encode(tokenizer, sample))))


def _row(candidate: Candidate, length: int) -> Row:
    tasks = {task: dict(result.measures) for task, result in candidate.tasks.items()}
    if candidate.divergences:
        values = candidate.divergences
        tasks["divergence"] = {"kl": Measure(value=sum(values) / len(values),
                                             stderr=standard_error("kl", (values, [1.0] * len(values))))}
    return Row(name=candidate.name, path=candidate.path, weight_bytes=candidate.weight_bytes,
               bits_per_weight=candidate.bits_per_weight, tasks=tasks, activations=candidate.activations,
               kv_bits=16.0 if candidate.kv is None else candidate.kv.bits_per_value,
               kv_bytes=None if candidate.kv is None else candidate.kv.bytes,
               kl_by_position=named(torch.tensor(candidate.by_position, dtype=torch.float64), length)
               if candidate.by_position else [], kl_generating=candidate.continued)
