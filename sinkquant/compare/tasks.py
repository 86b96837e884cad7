"""lm-eval's tasks for every model of a comparison, opened once; lm-eval is imported only where a task is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan, Measure
from sinkquant.evaluate.evaluate import fitting_characters
from sinkquant.evaluate.task_files import wanted_tasks
from sinkquant.evaluate.tasks import ready_tasks
from sinkquant.models import starts_with_bos
from sinkquant.recipe import Recipe

Scorer = Callable[[PreTrainedModel, KVCachePlan | None], dict[str, dict[str, Measure]]]


@contextlib.contextmanager
def scored_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, content: str,
                 room: int) -> Iterator[Scorer | None]:
    """What scores a model on the recipe's tasks while the context is open; None where it names none.

    Args:
        content: the evaluation text. room: tokens of a context.

    Raises:
        RequestError: a task cannot be had.
    """
    settings = recipe.evaluate
    if not settings.tasks and settings.task_folder is None:
        yield None
        return
    wanted = wanted_tasks(settings)
    from sinkquant.evaluate.run import open_tasks, score_tasks

    bos = starts_with_bos(tokenizer, recipe.calibration.bos)
    with ready_tasks(settings.text, content, wanted.names, recipe.seed,
                     fitting_characters(tokenizer, content, min(room, settings.window))) as folder:
        opened = open_tasks(wanted.names, folder, wanted.folder)

        def score(model: PreTrainedModel, kv: KVCachePlan | None) -> dict[str, dict[str, Measure]]:
            found = score_tasks(model, tokenizer, opened, wanted.names, bos=bos, limit=settings.limit,
                                sample=settings.sample, batch_size=settings.batch_size, seed=recipe.seed, kv=kv,
                                window=settings.window)
            return {task: dict(result.measures) for task, result in found.items()}

        yield score
