"""Refuses an evaluation that cannot be carried out, before any compute is spent."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sinkquant.evaluate.task_files import wanted_tasks
from sinkquant.evaluate.tasks import LOCAL_TASKS, build_tasks
from sinkquant.models import documents, read_text
from sinkquant.recipe import Recipe


def require_tasks_possible(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Read the evaluation text and look for the tasks.

    Args:
        tokenizer: of the model, whose chat template writes records of messages.

    Raises:
        RequestError: the text cannot be read, is empty, or is too short for the tasks; a task cannot be had.
    """
    settings = recipe.evaluate
    content = read_text(settings.text, "evaluation", tokenizer)
    wanted = wanted_tasks(settings)
    if settings.text is not None:
        with tempfile.TemporaryDirectory() as temporary:
            build_tasks(documents(content), Path(temporary), recipe.seed, tasks=wanted.names)
    others = [name for name in wanted.names if name not in LOCAL_TASKS]
    if others:
        from sinkquant.evaluate.run import open_tasks  # lm-eval

        open_tasks(others, None, wanted.folder)
