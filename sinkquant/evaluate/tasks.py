"""lm-eval tasks from any held-out text: YAML and jsonl, deterministic by seed.

`sink_perplexity`: passages for rolling perplexity. `sink_cloze`: the last word of a sentence against three words of
similar frequency. `sink_recall`: a sentence comes again after some 230 words of other prose; which of four sentences
stood first? The same end is scored after each of them, as Winogrande does, so that only the far text can tell.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sinkquant.evaluate.items import LONGEST, cloze_items, has_words, perplexity_items, recall_items
from sinkquant.models import documents as split_documents
from sinkquant.resources import task_folder

LOCAL_TASKS = ("sink_perplexity", "sink_cloze", "sink_recall")


def build_tasks(documents: list[str], folder: Path, seed: int = 0, *, tasks: Sequence[str] = LOCAL_TASKS,
                max_characters: int | None = None) -> list[str]:
    """Write tasks made of `documents` into `folder`: `<task>.yaml` and `<task>.jsonl`. Returns their names.

    Args:
        tasks: which of `LOCAL_TASKS`; other names are passed over.
        max_characters: what fits into the model's context; passages of `sink_perplexity` may be longer, they are
            scored in windows.

    Raises:
        RequestError: the text or the budget is too small for one of them, or it has no words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in LOCAL_TASKS if name in tasks]
    for name in wanted:
        # Each task draws for itself, so that its items do not depend on which others are made.
        generator = random.Random(f"{seed} {name}")
        if name == "sink_perplexity":
            items = perplexity_items(documents)
        elif name == "sink_cloze":
            items = cloze_items(documents, generator, max_characters)
        else:
            items = recall_items(documents, generator, max_characters)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task = definition(name, f"{name}.jsonl", words=has_words(documents))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return wanted


def definition(name: str, data: str, words: bool = True) -> dict[str, Any]:
    """The lm-eval task definition of that name over a jsonl file; no word perplexity of a text without words."""
    common: dict[str, Any] = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}},
                              "test_split": "test", "metadata": {"version": 1.0}}
    if name == "sink_perplexity":
        metrics = (*(["word_perplexity"] if words else []), "byte_perplexity", "bits_per_byte")
        return common | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
                         "metric_list": [{"metric": metric} for metric in metrics]}
    metrics = ("acc", "acc_norm")
    if name == "sink_recall":
        # An answer's number as the text makes lm-eval score `end` after each of the contexts.
        contexts = ", ".join(f"openings[{i}] ~ middle" for i in range(4))
        form = {"doc_to_text": "{{answer}}", "doc_to_choice": f"{{{{ [{contexts}] }}}}", "doc_to_target": "end"}
        metrics = ("acc",)  # acc_norm would divide by the lengths of the contexts
    else:
        form = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer"}
    return common | {"output_type": "multiple_choice"} | form | {
        "target_delimiter": "", "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                                                for metric in metrics]}


@contextlib.contextmanager
def ready_tasks(text: str | list[str] | None, content: str, tasks: Sequence[str], seed: int,
                max_characters: int | None = None) -> Iterator[Path]:
    """A temporary folder of task definitions that lm-eval can run from anywhere.

    The packaged ones are used where there is no text of the user's own and their items fit into the context; else
    tasks are made of `content`.

    Args:
        text: name of the user's own text, None for the packaged one. `content`: what it holds.
    """
    with tempfile.TemporaryDirectory(prefix="sinkquant-tasks-") as temporary:
        folder = Path(temporary)
        if text is not None or (max_characters is not None and max_characters < LONGEST):
            build_tasks(split_documents(content), folder, seed, tasks=tasks, max_characters=max_characters)
        else:
            for source in sorted(task_folder().glob("*.jsonl")) + sorted(task_folder().glob("*.yaml")):
                (folder / source.name).write_bytes(source.read_bytes())
        for path in folder.glob("*.yaml"):
            task = yaml.safe_load(path.read_text(encoding="utf-8"))
            # lm-eval reads data files relative to the working directory, and `datasets` would keep a copy of the
            # text in the user's cache for good.
            task["dataset_kwargs"] = {"data_files": {"test": str(folder / f"{path.stem}.jsonl")},
                                      "cache_dir": str(folder / "cache")}
            path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
        yield folder
