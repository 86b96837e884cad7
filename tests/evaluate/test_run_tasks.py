"""Real runs of lm-eval on a tiny model: values, samples, seeds, and nothing of it left behind."""

from __future__ import annotations

import json
import logging
import math
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.evaluate import LOCAL_TASKS, SinkLM
from sinkquant.evaluate import run as lm_eval_run
from sinkquant.evaluate.costs import task_tokens
from sinkquant.evaluate.run import open_tasks, score_tasks
from sinkquant.evaluate.tasks import ready_tasks
from sinkquant.models import encode
from sinkquant.recipe import Recipe


@pytest.fixture(scope="module")
def long_model() -> PreTrainedModel:
    from families import tiny_model

    return tiny_model("llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with ready_tasks("own", random_text(6_000), LOCAL_TASKS, 0, 1_000) as made:
        yield made


def run(model: PreTrainedModel, folder: Path | None, tasks: Any = LOCAL_TASKS, **kwargs: Any) -> dict[str, Any]:
    settings = {"bos": True, "batch_size": 4, "limit": 6} | kwargs
    opened = open_tasks(tasks, folder, quiet=settings.get("quiet", True))
    return score_tasks(model, tiny_tokenizer(), opened, tasks, **settings)


def test_values_are_those_of_the_samples_and_of_a_direct_run(long_model: PreTrainedModel, folder: Path) -> None:
    results = run(long_model, folder)
    assert set(results) == set(LOCAL_TASKS)
    assert {result.documents for result in results.values()} == {6}
    perplexity = results["sink_perplexity"]
    top, bottom = perplexity.samples["word_perplexity"]
    assert perplexity.measures["word_perplexity"].value == pytest.approx(math.exp(-sum(top) / sum(bottom)))
    assert not perplexity.higher_is_better["word_perplexity"]
    text = datasets.Dataset.from_json(str(folder / "sink_perplexity.jsonl"), cache_dir=str(folder / "cache"))[0]["text"]
    tokens = encode(tiny_tokenizer(), text)
    with torch.no_grad():
        logits = long_model(torch.tensor([[1, *tokens[:511]]])).logits[0].double()
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens[:512])[:, None]).sum()
    assert len(tokens) <= 512
    assert top[0] == pytest.approx(float(expected), rel=1e-5)
    assert bottom[0] == len(text.split())
    for task in ("sink_cloze", "sink_recall"):
        assert results[task].higher_is_better["acc"]
        assert results[task].measures["acc"].value == pytest.approx(sum(results[task].samples["acc"][0]) / 6)
    assert "acc_norm" in results["sink_cloze"].measures


def test_recall_scores_one_end_after_four_openings(long_model: PreTrainedModel, folder: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    original = SinkLM.loglikelihood

    def record(self: SinkLM, requests: list[Any], disable_tqdm: bool = False) -> Any:
        asked.extend(request.args for request in requests)
        return original(self, requests, disable_tqdm)

    monkeypatch.setattr(SinkLM, "loglikelihood", record)
    run(long_model, folder, ["sink_recall"], limit=2)
    assert len(asked) == 8
    for item in (asked[:4], asked[4:]):
        assert len({end for _, end in item}) == 1
        assert len({context.split("\n")[0] for context, _ in item}) == 4
        assert len({context.partition("\n")[2] for context, _ in item}) == 1


def test_without_the_far_sentence_recall_is_chance(long_model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "sink_recall.jsonl").read_text().splitlines()]
    blank = "".join(json.dumps(row | {"openings": [""] * 4}) + "\n" for row in rows)
    (tmp_path / "sink_recall.jsonl").write_text(blank)
    task = yaml.safe_load((folder / "sink_recall.yaml").read_text())
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "sink_recall.jsonl")},
                              "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "sink_recall.yaml").write_text(yaml.safe_dump(task))
    found = run(long_model, tmp_path, ["sink_recall"], limit=None)["sink_recall"]
    first = sum(row["answer"] == 0 for row in rows) / len(rows)  # four equal scores: the first one is taken
    assert found.measures["acc"].value == pytest.approx(first)
    assert 0.1 < first < 0.4


def test_same_seed_same_results(long_model: PreTrainedModel, folder: Path) -> None:
    assert run(long_model, folder, ["sink_cloze"]) == run(long_model, folder, ["sink_cloze"], batch_size=4)


def test_nothing_is_left_behind_and_nothing_is_fetched(long_model: PreTrainedModel, folder: Path,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local task must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.random(), np.random.random(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    level, bar = logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm
    capfd.readouterr()
    run(long_model, folder, ["sink_cloze"], limit=2, seed=99)
    assert (random.random(), np.random.random(), torch.rand(1)) == before
    assert logging.getLogger("lm_eval").level == level
    assert lm_eval.api.task.tqdm is bar
    assert not datasets.are_progress_bars_disabled()
    assert "it/s" not in "".join(capfd.readouterr())


@pytest.fixture
def hellaswag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks are one, without an index of all ten thousand of them."""
    place = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    monkeypatch.setattr(lm_eval_run, "TaskManager", lambda include_path=None, include_defaults=True: TaskManager(
        include_path=[str(place), *include_path] if include_defaults else include_path, include_defaults=False))


@pytest.mark.usefixtures("hellaswag_alone")
def test_a_task_that_does_not_exist_is_named_with_its_near_miss() -> None:
    with pytest.raises(RequestError, match=r"no task 'sink_recal', did you mean 'sink_recall'"):
        open_tasks(["sink_recal"], None)


@pytest.mark.usefixtures("hellaswag_alone")
def test_a_group_of_a_folder_may_name_a_task_of_lm_evals(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "group.yaml").write_text("group: both\ntask: [sink_cloze, hellaswag]\n", encoding="utf-8")
    download, asked = lm_eval.api.task.ConfigurableTask.download, []

    def out_of_reach(task: lm_eval.api.task.ConfigurableTask, *args: Any, **more: Any) -> None:
        asked.append(task.config.task)
        if task.config.task == "hellaswag":
            raise ConnectionError("its hub is out of reach")
        download(task, *args, **more)

    monkeypatch.setattr(lm_eval.api.task.ConfigurableTask, "download", out_of_reach)
    with pytest.raises(RequestError, match="its hub is out of reach"):
        open_tasks(["both"], folder, tmp_path)
    assert asked[-1] == "hellaswag"  # lm-eval's own is asked for its data


@pytest.mark.usefixtures("hellaswag_alone")
def test_a_task_whose_data_cannot_be_reached_is_named(long_model: PreTrainedModel, folder: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub.\nmore")

    monkeypatch.setattr(TaskManager, "load", fail)
    with pytest.raises(RequestError, match=r"lm-eval cannot load the task 'hellaswag' here.*Couldn't reach the Hub\.$"):
        run(long_model, folder, ["hellaswag"])


def test_other_ends_of_lines_in_a_text_are_text(tmp_path: Path) -> None:
    """JSON holds U+2028, U+2029 and U+0085 as they stand."""
    plain, text = random_text(3000), tmp_path / "text.txt"
    recipe = Recipe().replace([f"evaluate.text={text}", "evaluate.tasks=[sink_perplexity]"])
    counts = []
    for mark in (" ", "\u2028", "\u2029", "\x85"):
        text.write_text(plain.replace(" . ", f" .{mark}", 3), encoding="utf-8")
        counts.append(len(task_tokens(recipe, tiny_tokenizer())))
    assert counts == [1, 1, 1, 1]
