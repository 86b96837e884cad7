"""Tasks by name -> aggregated metrics and per-document samples, by lm-eval's `simple_evaluate`."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import numbers
import random
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan, Measure
from sinkquant.errors import RequestError, first_line
from sinkquant.evaluate.candidate import TaskResult
from sinkquant.evaluate.harness import SinkLM, require_positions, tokens_made
from sinkquant.evaluate.statistics import Samples, standard_error, value_of
from sinkquant.evaluate.task_files import unknown_task


def _exp(power: float) -> float:
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


UNBOUNDED = types.SimpleNamespace(**vars(math) | {"exp": _exp})
"""Python's math, of which `exp` ends in infinity."""


@dataclass(frozen=True)
class OpenTasks:
    """Tasks whose data was read, once for all models.

    Attributes:
        tasks: name -> lm-eval's task, group of tasks, or the tasks of a tag; managers: name -> where it came from.
        documents: how many every task has, those of groups each by itself.
    """

    tasks: dict[str, list[Any]]
    managers: dict[str, TaskManager]
    documents: dict[str, int]


def score_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opened: OpenTasks, tasks: Sequence[str],
                *, bos: bool, batch_size: int, limit: int | None = None, sample: int | None = None, seed: int = 0,
                window: int | None = None, quiet: bool = True, kv: KVCachePlan | None = None) -> dict[str, TaskResult]:
    """Score a model on tasks with lm-eval's `simple_evaluate`.

    A group of tasks comes back as its tasks. Several processes of torchrun share the requests; the first one gets the
    results, another may get none.

    Args:
        tasks: names of opened tasks.
        bos: whether rows of this model start with `<bos>`.
        limit: score only the first so many documents of each task.
        sample: where there is no limit, score so many documents of each task at most, drawn by the seed: the same ones
            for every model.
        window: tokens of a context, or of a window of rolling perplexity, at most; None: the model's positions.
        quiet: neither log lines nor progress bars of lm-eval.
        kv: score through a KV cache that is packed so; null for none.

    Raises:
        RequestError: an answer is longer than the context.
    """
    drawn = {} if sample is None or limit is not None else {
        name: _draw(name, count, sample, seed) for name, count in opened.documents.items() if count > sample}
    found: dict[str, TaskResult] = {}
    with _undisturbed(quiet):
        harness = SinkLM(model, tokenizer, bos, batch_size, quiet, window, kv)
        for name in tasks:
            result = lm_eval.simple_evaluate(
                model=harness, tasks=opened.tasks[name], task_manager=opened.managers[name],
                limit=limit, samples=drawn or None, log_samples=True, bootstrap_iters=0, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
            # lm-eval hands it to the first process of torchrun on a machine, which reports it
            found |= {} if result is None else {
                task: _result(samples, result["results"][task], result["higher_is_better"].get(task) or {})
                for task, samples in result["samples"].items()}
    return found


def open_tasks(tasks: Sequence[str], folder: Path | None, own: Path | None = None, quiet: bool = True,
               positions: int | None = None) -> OpenTasks:
    """Find tasks and read their data. Tasks of the folders need no network.

    Args:
        folder: holds the YAML of sinkquant's tasks. own: the user's folder of task files. Any other name is looked up
            among lm-eval's own.
        positions: of the model, to refuse tasks that generate more; None: not looked at.

    Raises:
        RequestError: there is no such task, its data cannot be read, or the model has no room for what it generates.
    """
    opened: dict[str, list[Any]] = {}
    managers: dict[str, TaskManager] = {}
    documents: dict[str, int] = {}
    with _undisturbed(quiet):
        paths = [str(path) for path in (own, folder) if path is not None]
        local, known = TaskManager(include_path=paths, include_defaults=False), None
        for name in tasks:
            found, manager = None, local
            if name in local.all_tasks:
                try:
                    found = _open(name, local, positions)
                except RequestError:
                    if name not in local.all_groups:
                        raise
            if found is None:  # or a group that names tasks of lm-eval's, whose ten thousand take long to list
                known = manager = known or TaskManager(include_path=paths)
                if name not in known.all_tasks:
                    raise RequestError(unknown_task(name, own, local.all_tasks))
                found = _open(name, known, positions)
            managers[name], opened[name] = manager, found[0]
            documents |= found[1]
    return OpenTasks(opened, managers, documents)


def _open(name: str, manager: TaskManager, positions: int | None) -> tuple[list[Any], dict[str, int]]:
    """What lm-eval makes of a name, and how many documents every task of it has."""
    try:
        found = manager.load([name])
        unsafe = [key for key, task in found["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        inside = {task for group in found["groups"].values() for task in group.get_all_tasks()}
        if unsafe:
            raise RequestError(f"the task {unsafe[0]!r} runs code that a model writes, which is not done here; leave "
                               "it out, or run it with lm-eval itself.")
        for key, task in found["tasks"].items():
            if positions is not None and task.OUTPUT_TYPE == "generate_until":
                require_positions(key, tokens_made(task.config.generation_kwargs or {}), positions)
        top = [group for key, group in found["groups"].items() if key == name] or [
            task for task in found["tasks"].values() if task not in inside]
        return top, {key: len(task.eval_docs) for key, task in found["tasks"].items()}
    except RequestError:
        raise
    except Exception as error:  # whatever a task's own code, its data set or the network may raise
        raise RequestError(f"lm-eval cannot load the task {name!r} here, its data has to be reachable: "
                           f"{first_line(error)}.") from error


def _draw(name: str, count: int, sample: int, seed: int) -> list[int]:
    """Indices of so many documents, ascending; each task draws for itself."""
    return sorted(random.Random(f"{seed} {name}").sample(range(count), sample))


def _result(samples: list[dict[str, Any]], aggregate: dict[str, Any], directions: dict[str, Any]) -> TaskResult:
    measures: dict[str, Measure] = {}
    kept: dict[str, Samples] = {}
    higher: dict[str, bool] = {}
    for key, value in aggregate.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not _number(value) or not math.isfinite(value):
            continue
        name = metric if filtered == "none" else key
        found = _per_document([s for s in samples if s.get("filter", "none") == filtered], metric)
        # Some metrics are no ratio of sums over documents (a correlation, say): those cannot be resampled as one.
        if found is not None and any(found[1]) and math.isclose(
                value_of(metric, sum(found[0]), sum(found[1])), value, rel_tol=1e-6, abs_tol=1e-9):
            kept[name] = found
        error = standard_error(metric, kept[name]) if name in kept else None
        measures[name] = Measure(value=float(value), stderr=error)
        higher[name] = directions.get(metric) is not False  # lm-eval says nothing of metrics of a task's own
    return TaskResult(measures, kept, higher, len({sample["doc_id"] for sample in samples}))


def _per_document(samples: list[dict[str, Any]], metric: str) -> Samples | None:
    """Numerators and denominators; None where a document has no number, or something else than one or two."""
    values = [sample.get(metric) for sample in samples]
    if values and all(_number(value) for value in values):
        return [float(value) for value in values], [1.0] * len(values)  # type: ignore[arg-type]
    if values and all(isinstance(value, tuple | list) and len(value) == 2
                      and all(_number(one) for one in value) for value in values):
        return [float(value[0]) for value in values], [float(value[1]) for value in values]  # type: ignore[index]
    return None


def _number(value: Any) -> bool:
    """Python's or numpy's, truth values among them."""
    return isinstance(value, numbers.Real | np.bool_)


@contextlib.contextmanager
def _undisturbed(quiet: bool) -> Iterator[None]:
    """Keep lm-eval from leaving its marks: the global random states it seeds, log levels, progress bars. The list of
    every package installed, which it has pip collect for each task, takes longer than a small task and is not read;
    nor is the commit of the working directory, for which it lets git complain where there is none. A perplexity that no
    float holds, of a text without spaces counted by words, is infinite instead of an error."""
    states = random.getstate(), np.random.get_state()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    environment, commit = lm_eval.evaluator.add_env_info, lm_eval.evaluator.get_git_commit_hash
    lm_eval.evaluator.add_env_info = lambda _results: None
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    lm_eval.api.metrics.math = UNBOUNDED
    bar, bars_off = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    if quiet:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
        datasets.disable_progress_bars()
    try:
        # Without devices all GPUs are asked for their states, used or not.
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval.api.task.tqdm, lm_eval.api.metrics.math = bar, math
        lm_eval.evaluator.add_env_info, lm_eval.evaluator.get_git_commit_hash = environment, commit
        if quiet and not bars_off:
            datasets.enable_progress_bars()
