"""Models -> Report: every row on the same documents, beside the unquantized model and the control."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan, Measure, Paired, Report, Row, SinkFidelity
from sinkquant.artifacts.report import Fidelity
from sinkquant.errors import RequestError
from sinkquant.evaluate.divergence import held_out_rows, row_divergences
from sinkquant.evaluate.results import TaskResult
from sinkquant.evaluate.statistics import Samples, paired_difference, recovery, standard_error
from sinkquant.evaluate.tasks import LOCAL_TASKS, build_tasks, ready_tasks
from sinkquant.evaluate.verdict import judge
from sinkquant.models import documents, encode, max_length, read_text, starts_with_bos
from sinkquant.models.processes import shared
from sinkquant.recipe import Recipe

BASELINE = "unquantized"
PAIRS = (("control", "sink_aware"), ("pruned_control", "pruned"), ("weights_control", "weights"),
         ("cache_control", "cache"),
         ("sink_aware", BASELINE), ("control", BASELINE), ("quantized", BASELINE))
Compare = Callable[[PreTrainedModel, PreTrainedModel], SinkFidelity]
FILL = 0.85
"""Share of a context that items are made for: passages differ in how many tokens a character takes."""


@dataclass
class Candidate:
    """A model to be measured: loaded when its turn comes, so that only the baseline stays in memory beside it.

    `kv`: the KV cache that it is read through, null for an unquantized one; `activations`: what inputs are rounded to.
    `tasks_too`: whether tasks are run, or the divergence alone. `tasks` and `divergences` (nats per token, one per row)
    are filled by `evaluate`.
    """

    name: str
    path: str
    load: Callable[[], PreTrainedModel]
    weight_bytes: int
    bits_per_weight: float
    kv: KVCachePlan | None = None
    activations: str = "16-bit"
    tasks_too: bool = True
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)


def evaluate(candidates: list[Candidate], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, model: str,
             fidelity: Fidelity | None = None, compare: Compare | None = None,
             progress: Callable[[int, int, str], None] | None = None) -> Report:
    """Measure the candidates and compare them in pairs.

    The candidate named "unquantized", where there is one, is the baseline of divergence and recovery.

    Args:
        model: name of the model, for the report.
        fidelity: sink rates and massive activations of the rows, measured by the caller.
        compare: is called with the baseline and every other model while both are loaded; what it finds goes into
            the report's fidelity.
        progress: is called with (steps done, steps, label); a step is one task or the divergence of one candidate.

    Raises:
        RequestError: no candidates or two of one name; the evaluation text is too short; a task cannot be had.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"evaluation needs candidates with names of their own, not {names}.")
    from sinkquant.evaluate.run import run_tasks  # lm-eval takes 130 MB, which detection and quantization do without

    settings = recipe.evaluate
    bos = starts_with_bos(tokenizer, recipe.calibration.bos)
    content = read_text(settings.text, "evaluation", tokenizer)
    steps = _Steps(sum(1 + len(settings.tasks) * candidate.tasks_too for candidate in candidates), progress)
    baseline: PreTrainedModel | None = None
    comparisons: dict[str, SinkFidelity] = {}
    rows: torch.Tensor | None = None
    with contextlib.ExitStack() as stack:
        for candidate in sorted(candidates, key=lambda c: c.name != BASELINE):
            loaded = candidate.load()
            if rows is None:
                limit = max_length(loaded) - max(len(c.kv.front) if c.kv else 0 for c in candidates)
                rows = held_out_rows(loaded, tokenizer, content, recipe, limit)
                folder = stack.enter_context(ready_tasks(
                    settings.text, content, settings.tasks, recipe.seed, _characters(tokenizer, content, limit)))
            for task in settings.tasks if candidate.tasks_too else []:
                steps.next(f"{candidate.name}: {task}")
                candidate.tasks |= run_tasks(loaded, tokenizer, [task], folder, bos=bos, limit=settings.limit,
                                             batch_size=settings.batch_size, seed=recipe.seed, kv=candidate.kv)
            steps.next(f"{candidate.name}: divergence")
            if candidate.name == BASELINE:
                baseline = loaded
            elif baseline is not None:
                candidate.divergences = _divergences(baseline, loaded, rows, candidate.kv)
                if compare is not None and candidate.tasks_too:
                    comparisons[candidate.name] = compare(baseline, loaded)
            del loaded  # before the next one is loaded: only the baseline stays
    steps.next("")
    assert rows is not None
    if comparisons:
        fidelity = fidelity or Fidelity(sink_rate={}, massive_peak={}, massive_ratio={})
        fidelity = fidelity.model_copy(update={"comparisons": comparisons})
    found = [_row(candidate) for candidate in candidates]
    paired = _pairs(candidates, recipe)
    left = _recovery(candidates)
    facts: dict[str, str | int | float | bool | None] = {
        "text": settings.text or "packaged evaluation text", "rows": len(rows), "length": rows.shape[1],
        "rows_start_with_bos": bos, "seed": recipe.seed, "limit": settings.limit, "dtype": recipe.compute.dtype,
        "bootstrap_resamples": settings.bootstrap}
    facts |= {f"documents: {task}": result.documents for task, result in candidates[0].tasks.items()}
    return Report(model=model, recipe=recipe.name, rows=found, paired=paired, recovery=left, fidelity=fidelity,
                  verdict=judge(found, paired, left, fidelity, recipe.gate), evaluation=facts)


def _divergences(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor,
                 kv: KVCachePlan | None) -> list[float]:
    """`row_divergences`; several processes compare a share of the rows each."""
    return shared(range(len(rows)), lambda mine: row_divergences(baseline, other, rows[mine], kv=kv))


def require_tasks_possible(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Read the evaluation text and look for the tasks before any compute is spent.

    Args:
        tokenizer: of the model, whose chat template writes records of messages.

    Raises:
        RequestError: the text cannot be read, is empty, or is too short for the tasks; a task cannot be had.
    """
    settings = recipe.evaluate
    content = read_text(settings.text, "evaluation", tokenizer)
    if not settings.tasks:
        raise RequestError("evaluate.tasks is empty; name at least one task.")
    if settings.text is not None:
        with tempfile.TemporaryDirectory() as temporary:
            build_tasks(documents(content), Path(temporary), recipe.seed, tasks=settings.tasks)
    if set(settings.tasks) - set(LOCAL_TASKS):
        from sinkquant.evaluate.run import require_tasks

        require_tasks(settings.tasks)


class _Steps:
    """Counts steps: `next` ends the one that runs and begins another."""

    def __init__(self, total: int, progress: Callable[[int, int, str], None] | None) -> None:
        self.total, self.progress, self.begun = total, progress, 0

    def next(self, label: str) -> None:
        if self.progress:
            self.progress(self.begun, self.total, f"evaluating {label}" if label else "evaluated")
        self.begun += 1


def _characters(tokenizer: PreTrainedTokenizerBase, content: str, limit: int) -> int:
    """How many characters of this text surely fit into a context of `limit` tokens."""
    sample = content[:50_000]
    return int(FILL * limit * len(sample) / max(1, len(encode(tokenizer, sample))))


def _row(candidate: Candidate) -> Row:
    tasks = {task: dict(result.measures) for task, result in candidate.tasks.items()}
    if candidate.divergences:
        samples = _means(candidate.divergences)
        mean = sum(candidate.divergences) / len(candidate.divergences)
        tasks["divergence"] = {"kl": Measure(value=mean, stderr=standard_error("kl", samples))}
    return Row(name=candidate.name, path=candidate.path, weight_bytes=candidate.weight_bytes,
               bits_per_weight=candidate.bits_per_weight, tasks=tasks, activations=candidate.activations,
               kv_bits=16.0 if candidate.kv is None else candidate.kv.bits_per_value,
               kv_bytes=None if candidate.kv is None else candidate.kv.bytes)


def _means(values: list[float]) -> Samples:
    return values, [1.0] * len(values)


def _pairs(candidates: list[Candidate], recipe: Recipe) -> list[Paired]:
    by_name = {candidate.name: candidate for candidate in candidates}
    paired = []
    for a, b in PAIRS:
        if a not in by_name or b not in by_name:
            continue
        first, second = by_name[a], by_name[b]
        measured = [("divergence", "kl", _means(first.divergences), _means(second.divergences), False)]
        measured += [(task, metric, samples, second.tasks[task].samples[metric], result.higher_is_better[metric])
                     for task, result in first.tasks.items() for metric, samples in result.samples.items()
                     if metric in second.tasks[task].samples]
        for task, metric, one, two, higher in measured:
            count = min(len(one[0]), len(two[0]))
            if count < 2:
                continue  # not measured, or on one document, whose spread nobody knows
            difference, low, high = paired_difference(metric, one, two, recipe.evaluate.bootstrap, recipe.seed)
            paired.append(Paired(task=task, metric=metric, a=a, b=b, difference=difference, low=low, high=high,
                                 higher_is_better=higher, documents=count))
    return paired


def _recovery(candidates: list[Candidate]) -> dict[str, dict[str, dict[str, float]]]:
    """By row, task and metric; empty without a baseline."""
    base = next((candidate for candidate in candidates if candidate.name == BASELINE), None)
    left: dict[str, dict[str, dict[str, float]]] = {}
    for candidate in candidates if base is not None else []:
        for task, result in candidate.tasks.items() if candidate is not base else []:
            for metric, measure in result.measures.items():
                reference = base.tasks[task].measures.get(metric) if base and task in base.tasks else None
                share = recovery(measure.value, reference.value, result.higher_is_better[metric]) if reference else None
                if share is not None:
                    left.setdefault(candidate.name, {}).setdefault(task, {})[metric] = share
    return left
