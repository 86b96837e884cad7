"""Tasks beside divergences: the options that benchmarks share, and a number per document."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.evaluate.run import open_tasks, score_tasks
from sinkquant.models.text import starts_with_bos

Scores = Callable[[PreTrainedModel], dict[str, list[float]]]
"""A model -> task -> a number per document: 1 where it is right, by "acc"."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """--tasks, --task-folder and --limit."""
    parser.add_argument("--tasks", nargs="*", default=[], help="also the accuracy in these")
    parser.add_argument("--task-folder", type=Path, help="of lm-eval's task files")
    parser.add_argument("--limit", type=int, default=100, help="documents of every task, the first ones")


def task_scores(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Scores | None:
    """What scores a model, or None where no task is asked for."""
    if not arguments.tasks:
        return None
    opened = open_tasks(arguments.tasks, None, arguments.task_folder)
    bos = starts_with_bos(tokenizer, "auto")

    def score(model: PreTrainedModel) -> dict[str, list[float]]:
        found = score_tasks(model, tokenizer, opened, arguments.tasks, bos=bos, batch_size=8, limit=arguments.limit)
        return {name: result.samples["acc"][0] for name, result in found.items()}

    return score
