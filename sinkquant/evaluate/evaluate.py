"""Models -> Report: every row on the same documents, beside the unquantized model and the control."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Measure, Paired, Report, Row
from sinkquant.artifacts.report import Fidelity
from sinkquant.errors import RequestError
from sinkquant.evaluate.divergence import row_divergences
from sinkquant.evaluate.harness import HIGHER_IS_BETTER, TaskResult, run_tasks
from sinkquant.evaluate.statistics import paired_difference, standard_error
from sinkquant.evaluate.tasks import build_tasks
from sinkquant.evaluate.verdict import judge
from sinkquant.models import documents, read_text, starts_with_bos, token_rows
from sinkquant.recipe import Recipe
from sinkquant.resources import task_folder

BASELINE = "unquantized"


@dataclass
class Candidate:
    """A model to be measured: loaded when its turn comes, so that only the baseline stays in memory beside it."""

    name: str
    path: str
    load: Callable[[], PreTrainedModel]
    weight_bytes: int
    bits_per_weight: float
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)


def evaluate(candidates: list[Candidate], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, model: str,
             fidelity: Fidelity | None = None, progress: Callable[[int, int, str], None] | None = None) -> Report:
    """Measure the candidates and compare them in pairs.

    The candidate named "unquantized", where there is one, is the baseline of divergence and recovery.

    Raises:
        RequestError: the evaluation text is too short, or a task cannot be had.
    """
    settings = recipe.evaluate
    bos = starts_with_bos(tokenizer, recipe.calibration.bos)
    content = read_text(settings.text, "evaluation")
    baseline = None
    with _tasks(settings.text, content, recipe.seed) as folder:
        for done, candidate in enumerate(sorted(candidates, key=lambda c: c.name != BASELINE)):
            if progress:
                progress(done, len(candidates), f"evaluating {candidate.name}")
            loaded = candidate.load()
            limit = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20
            rows = token_rows(tokenizer, content, settings.divergence_rows, min(settings.divergence_length, limit),
                              recipe.calibration.bos, loaded.get_input_embeddings().weight.shape[0], "evaluation text")
            candidate.tasks = run_tasks(loaded, tokenizer, settings.tasks, folder, bos=bos,
                                        batch_size=settings.batch_size, limit=settings.limit, seed=recipe.seed)
            if candidate.name == BASELINE:
                baseline = loaded
            elif baseline is not None:
                candidate.divergences = row_divergences(baseline, loaded, rows)
            if progress:
                progress(done + 1, len(candidates), f"evaluating {candidate.name}")
    found = [_row(candidate) for candidate in candidates]
    paired = _pairs(candidates, recipe)
    recovery = _recovery(found)
    facts: dict[str, str | int | float | bool | None] = {
        "text": settings.text or "packaged evaluation text", "rows": len(rows), "length": rows.shape[1],
        "rows_start_with_bos": bos, "seed": recipe.seed, "limit": settings.limit, "dtype": recipe.compute.dtype,
        "bootstrap_resamples": settings.bootstrap}
    return Report(model=model, recipe=recipe.name, rows=found, paired=paired, recovery=recovery, fidelity=fidelity,
                  verdict=judge(found, paired, recovery, fidelity, recipe.gate), evaluation=facts)


@contextlib.contextmanager
def _tasks(text: str | None, content: str, seed: int) -> Iterator[Path]:
    """The folder of task definitions: packaged, or made of the user's own text."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if text is not None:
            build_tasks(documents(content), folder, seed)
        else:
            for source in task_folder().glob("*.jsonl"):
                (folder / source.name).write_bytes(source.read_bytes())
            for source in task_folder().glob("*.yaml"):
                (folder / source.name).write_bytes(source.read_bytes())
        for definition in folder.glob("*.yaml"):
            # lm-eval reads data files relative to the working directory.
            data = f"{definition.stem}.jsonl"
            definition.write_text(definition.read_text(encoding="utf-8").replace(data, str(folder / data)),
                                  encoding="utf-8")
        yield folder


def _row(candidate: Candidate) -> Row:
    tasks = {task: dict(result.measures) for task, result in candidate.tasks.items()}
    if candidate.divergences:
        mean = sum(candidate.divergences) / len(candidate.divergences)
        tasks["divergence"] = {"kl": Measure(value=mean, stderr=standard_error(candidate.divergences))}
    return Row(name=candidate.name, path=candidate.path, weight_bytes=candidate.weight_bytes,
               bits_per_weight=candidate.bits_per_weight, tasks=tasks)


def _pairs(candidates: list[Candidate], recipe: Recipe) -> list[Paired]:
    by_name = {candidate.name: candidate for candidate in candidates}
    paired = []
    for a, b in (("control", "sink_aware"), ("sink_aware", BASELINE), ("control", BASELINE)):
        if a not in by_name or b not in by_name:
            continue
        first, second = by_name[a], by_name[b]
        if first.divergences and second.divergences:
            ones = [1.0] * len(first.divergences)
            paired.append(_pair("divergence", "kl", a, b, (first.divergences, ones), (second.divergences, ones), recipe))
        for task, result in first.tasks.items():
            paired += [_pair(task, metric, a, b, samples, second.tasks[task].samples[metric], recipe)
                       for metric, samples in result.samples.items() if metric in second.tasks[task].samples]
    return paired


def _pair(task: str, metric: str, a: str, b: str, first: tuple[list[float], list[float]],
          second: tuple[list[float], list[float]], recipe: Recipe) -> Paired:
    difference, low, high = paired_difference(metric, first, second, recipe.evaluate.bootstrap, recipe.seed)
    return Paired(task=task, metric=metric, a=a, b=b, difference=difference, low=low, high=high,
                  higher_is_better=metric in HIGHER_IS_BETTER)


def _recovery(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """quantized / unquantized; the other way round where lower is better."""
    base = next((row for row in rows if row.name == BASELINE), None)
    if base is None:
        return {}
    recovery: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for task, metrics in row.tasks.items():
            for metric, measure in metrics.items():
                reference = base.tasks.get(task, {}).get(metric)
                if row is base or reference is None or not reference.value or not measure.value:
                    continue
                up = metric in HIGHER_IS_BETTER
                ratio = measure.value / reference.value if up else reference.value / measure.value
                recovery.setdefault(row.name, {}).setdefault(task, {})[metric] = ratio
    return recovery


def require_tasks_possible(recipe: Recipe) -> None:
    """Read the evaluation text before any compute is spent.

    Raises:
        RequestError: it cannot be read, is empty, or is too short for the tasks.
    """
    content = read_text(recipe.evaluate.text, "evaluation")
    if not recipe.evaluate.tasks:
        raise RequestError("evaluate.tasks is empty; name at least one task.")
    if recipe.evaluate.text is not None:
        with tempfile.TemporaryDirectory() as temporary:
            build_tasks(documents(content), Path(temporary), recipe.seed)
