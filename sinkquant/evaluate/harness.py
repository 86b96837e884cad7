"""lm-eval's own harness over a loaded model, with `<bos>` exactly once at the start of every window."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Measure
from sinkquant.errors import RequestError
from sinkquant.models import encode

HIGHER_IS_BETTER = frozenset({"acc", "acc_norm", "exact_match", "f1"})


@dataclass(frozen=True)
class TaskResult:
    """One task. `samples`: metric -> (numerators, denominators) per document, for paired statistics; the metric is
    their ratio of sums, through exp(-x) where `perplexity` says so."""

    measures: dict[str, Measure]
    samples: dict[str, tuple[list[float], list[float]]]


class SinkLM(HFLM):  # type: ignore[misc]
    """HFLM that never guesses about `<bos>`: no text is given one by the tokenizer, every window starts with it.

    lm-eval's own backend decides by the first string of a batch, and windows after the first have none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bos: bool, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
        self._bos = bos

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first scored token: `<bos>`, or the end-of-text token where rows have none."""
        if self._bos:
            return int(self.tokenizer.bos_token_id)
        return int(self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else 0)

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Token ids without any special token."""
        return encode(self.tokenizer, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Split where the whole is tokenized, `<bos>` in front of the context."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        front = [self.prefix_token_id] if self._bos else []
        before = self.tok_encode(context)
        whole = self.tok_encode(context + continuation)
        room = self.max_length - len(front)
        target = whole[len(before):]
        return front + before[max(0, len(before) + len(target) - room):], target

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents in disjoint windows, each of which starts with the prefix token."""
        scores = []
        for (text,) in [request.args for request in requests]:
            tokens = self.tok_encode(text)
            room = self.max_length - 1
            windows = [tokens[start:start + room] for start in range(0, len(tokens), room)]
            pairs = [(("", ""), [self.prefix_token_id], window) for window in windows if window]
            scores.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return scores


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], folder: Path, *, bos: bool,
              batch_size: int, limit: int | None, seed: int) -> dict[str, TaskResult]:
    """Score a model on tasks with lm-eval's `simple_evaluate`.

    Args:
        folder: holds the YAML of local tasks; any other name is looked up among lm-eval's own.
        bos: whether rows of this model start with `<bos>`.

    Raises:
        RequestError: there is no such task, or its data cannot be reached.
    """
    local = {path.stem for path in folder.glob("*.yaml")}
    outside = [task for task in tasks if task not in local]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=bool(outside))
        result = lm_eval.simple_evaluate(
            model=SinkLM(model, tokenizer, bos, batch_size), tasks=list(tasks), task_manager=manager, limit=limit,
            log_samples=True, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, verbosity=None)
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        if not outside:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"the task {outside[0]!r} is not among {', '.join(sorted(local))} and lm-eval cannot give "
                           f"it here: {reason}") from error
    return {task: _result(result["samples"][task], result["results"][task]) for task in tasks}


def _result(samples: list[dict[str, Any]], aggregate: dict[str, Any]) -> TaskResult:
    measures, kept = {}, {}
    for key, value in aggregate.items():
        metric, _, filtered = key.partition(",")
        if filtered != "none" or metric.endswith("_stderr") or metric == "alias" or isinstance(value, str):
            continue
        values = [sample[metric] for sample in samples if metric in sample]
        if values and isinstance(values[0], tuple | list):
            kept[metric] = ([float(v[0]) for v in values], [float(v[1]) for v in values])
        elif values:
            kept[metric] = ([float(v) for v in values], [1.0] * len(values))
        stderr = _stderr(kept[metric], metric) if metric in kept else None
        measures[metric] = Measure(value=float(value), stderr=stderr)
    return TaskResult(measures, kept)


def _stderr(samples: tuple[list[float], list[float]], metric: str) -> float | None:
    """Standard error by the delta method for a ratio of sums over documents."""
    top, bottom = (torch.tensor(part, dtype=torch.float64) for part in samples)
    if len(top) < 2:
        return None
    ratio = top.sum() / bottom.sum()
    error = (top - ratio * bottom).std() * len(top) ** 0.5 / bottom.sum()
    if metric.endswith("perplexity"):
        error = error * torch.exp(-ratio)
    elif metric == "bits_per_byte":
        error = error / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return float(error)


def value_of(metric: str, top: Any, bottom: Any) -> Any:
    """A metric from sums over documents (arrays or numbers), as lm-eval aggregates it."""
    ratio = torch.as_tensor(top, dtype=torch.float64) / torch.as_tensor(bottom, dtype=torch.float64)
    if metric.endswith("perplexity"):
        return torch.exp(-ratio).numpy()
    if metric == "bits_per_byte":
        return (-ratio / torch.log(torch.tensor(2.0, dtype=torch.float64))).numpy()
    return ratio.numpy()


__all__ = ["HIGHER_IS_BETTER", "SinkLM", "TaskResult", "run_tasks", "value_of"]
