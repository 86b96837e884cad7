"""Tasks beside divergences: the options that benchmarks share, and a number per document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.evaluate.run import open_tasks, score_tasks
from sinkquant.models.text import starts_with_bos


@dataclass(frozen=True)
class Scores:
    """What scores a model in tasks, its documents one by one.

    Attributes:
        names: of the tasks. opened: what `open_tasks` makes of them. limit: documents of every task, the first ones.
        bos: whether a document starts with the tokenizer's.
    """

    names: Sequence[str]
    opened: Any
    tokenizer: PreTrainedTokenizerBase
    limit: int
    bos: bool

    def __call__(self, model: PreTrainedModel, kv: KVCachePlan | None = None,
                 names: Sequence[str] | None = None) -> dict[str, list[float]]:
        """Task -> a number per document: 1 where it is right, by "acc".

        Of a task with a perplexity also "TASK, nats": minus the log-probability of the right answer, which tells models
        apart on far fewer documents than being right does.

        Args:
            kv: how the model's cache is packed. names: of the tasks, all where none are given.
        """
        found = score_tasks(model, self.tokenizer, self.opened, list(names or self.names), bos=self.bos, batch_size=8,
                            limit=self.limit, kv=kv)
        scores = {name: result.samples["acc"][0] for name, result in found.items()}
        return scores | {f"{name}, nats": [float(f"{-value:.6g}") for value in result.samples["perplexity"][0]]
                         for name, result in found.items() if "perplexity" in result.samples}


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
    return Scores(arguments.tasks, opened, tokenizer, arguments.limit, starts_with_bos(tokenizer, "auto"))
