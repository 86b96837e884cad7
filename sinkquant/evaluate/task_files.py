"""The tasks that a recipe names: those in a user's folder of lm-eval task files, and what is wrong with them, without
lm-eval; and an evaluation that cannot be carried out is refused before any compute is spent."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import expanduser  # pathlib's fails for a name that begins with ~ and is no user
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from sinkquant.errors import RequestError
from sinkquant.evaluate.tasks import LOCAL_TASKS, build_tasks
from sinkquant.models import documents, read_text
from sinkquant.recipe import Recipe, near_miss
from sinkquant.recipe.measuring import Evaluation

FILES = ("json", "csv", "text", "parquet")
"""Loaders of `datasets` that read the files that `data_files` names."""


@dataclass(frozen=True)
class WantedTasks:
    """The tasks that a recipe asks for.

    Attributes:
        names: in order. folder: of the user's task files, if there is one.
    """

    names: list[str]
    folder: Path | None = None


class _Loader(yaml.SafeLoader):
    """YAML in which lm-eval's tags, `!function` and the like, stand for nothing."""


_Loader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)


def wanted_tasks(settings: Evaluation) -> WantedTasks:
    """The tasks of a recipe; where it names none of those in its `task_folder`, all of them are added.

    Raises:
        RequestError: no tasks are named; the folder is missing or holds no task, a broken file, or a task whose data is
            missing.
    """
    if not settings.tasks and settings.task_folder is None:
        raise RequestError("evaluate.tasks is empty; name at least one task.")
    if settings.task_folder is None:
        return WantedTasks(settings.tasks)
    folder = Path(expanduser(settings.task_folder))
    inside, together = tasks_in(folder)
    names = list(dict.fromkeys(settings.tasks))
    if not set(names) & {*inside, *together}:
        names += inside or together
    return WantedTasks(names, folder)


def tasks_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the tasks in a folder's YAML files, and of the groups and tags that stand for several; both sorted.

    Raises:
        RequestError: as `wanted_tasks`.
    """
    if not folder.is_dir():
        raise RequestError(f"evaluate.task_folder {folder} is no folder; name one that holds lm-eval task files.")
    names: dict[str, Path] = {}
    together: set[str] = set()
    for path in sorted(folder.rglob("*.yaml")):
        content = _read(path)
        tags = content.get("tag") or []
        together |= {one for one in [content.get("group"), *(tags if isinstance(tags, list) else [tags])]
                     if isinstance(one, str)}
        name = content.get("task")
        if not isinstance(name, str):
            continue  # a file that others include, or a group
        if name in LOCAL_TASKS:
            raise RequestError(f"{path} defines {name}, which is a task of sinkquant's own; give it another name.")
        if name in names:
            raise RequestError(f"{path} and {names[name]} both define the task {name!r}; rename one.")
        names[name] = path
        for data in _data_files(content):
            if not Path(expanduser(data)).exists():
                raise RequestError(f"the task {name!r} in {path} reads {data}, and there is no such file; a path that "
                                   "is not absolute starts at the working directory.")
    if not names and not together:
        raise RequestError(f"evaluate.task_folder {folder} holds no lm-eval task file (*.yaml with a key 'task').")
    return sorted(names), sorted(together)


def unknown_task(name: str, folder: Path | None, inside: Sequence[str]) -> str:
    """The sentence that refuses a task that nobody knows.

    Args:
        folder: the user's, if there is one. inside: names of the tasks that were found in folders.
    """
    own = [task for task in inside if task not in LOCAL_TASKS]
    where = "" if folder is None else f", nor does {folder} hold it ({', '.join(own)})"
    return (f"there is no task {name!r}{near_miss(name, [*LOCAL_TASKS, *own])}: it is neither one of sinkquant's "
            f"({', '.join(LOCAL_TASKS)}) nor one of lm-eval's{where}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"the task file {path} is not YAML: {' '.join(str(error).split()).rstrip('.')}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"the task file {path} is no mapping of keys to values.")
    return content


def _data_files(content: dict[str, Any]) -> Iterator[str]:
    """Local files that a task reads, without patterns and addresses."""
    if content.get("dataset_path") not in FILES or not isinstance(content.get("dataset_kwargs"), dict):
        return
    waiting = [content["dataset_kwargs"].get("data_files")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and "://" not in one and not any(mark in one for mark in "*?["):
            yield one


def require_tasks_possible(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None,
                           positions: int | None = None) -> None:
    """Read the evaluation text and look for the tasks.

    Args:
        tokenizer: of the model, whose chat template writes records of messages.
        positions: of the model; None where they are not known yet.

    Raises:
        RequestError: the text cannot be read, is empty, or is too short for the tasks; a task cannot be had, or
            generates more than the model has positions for.
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

        open_tasks(others, None, wanted.folder, positions=positions)
