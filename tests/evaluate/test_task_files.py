"""A folder of the user's own task files: its tasks run, and what is wrong with it is said before any compute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from families import tiny_model
from small_runs import model_folder
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from sinkquant.cli import app
from sinkquant.errors import RequestError
from sinkquant.evaluate import Candidate, evaluate, require_tasks_possible
from sinkquant.evaluate.run import _result, open_tasks, score_tasks
from sinkquant.evaluate.task_files import tasks_in, wanted_tasks
from sinkquant.recipe import Recipe

ITEMS = 30


def task_folder(folder: Path, *names: str, data: str | None = None) -> Path:
    """A folder with a task of two choices per name."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [{"question": f"w{8 + i} w{9 + i}", "choices": [" w20", " w21 w22"], "gold": i % 2} for i in range(ITEMS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    for name in names:
        content = {"task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                   "dataset_kwargs": {"data_files": {"test": data or str(folder / "items.jsonl")},
                                      "cache_dir": str(folder / "cache")},
                   "doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "gold",
                   "metric_list": [{"metric": "acc"}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def asking(folder: Path, *assignments: str) -> Recipe:
    return Recipe().replace([f"evaluate.task_folder={folder}", *assignments])


def test_names_in_the_folder_are_chosen_or_all_of_them(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", "mine", "other")
    (folder / "template.yaml").write_text("output_type: multiple_choice\n", encoding="utf-8")
    (folder / "functions.yaml").write_text("task: third\ndoc_to_target: !function helper.target\n", encoding="utf-8")
    assert tasks_in(folder) == (["mine", "other", "third"], [])
    some = wanted_tasks(asking(folder, "evaluate.tasks=[sink_cloze, other]").evaluate)
    assert (some.names, some.folder) == (["sink_cloze", "other"], folder)
    every = wanted_tasks(asking(folder, "evaluate.tasks=[sink_cloze, piqa]").evaluate)
    assert every.names == ["sink_cloze", "piqa", "mine", "other", "third"]
    assert wanted_tasks(asking(folder, "evaluate.tasks=[]").evaluate).names == ["mine", "other", "third"]
    assert wanted_tasks(Recipe().evaluate).folder is None


def test_a_sample_is_drawn_by_the_seed_and_the_same_for_every_model(tmp_path: Path) -> None:
    opened = open_tasks(["mine", "other"], None, task_folder(tmp_path / "tasks", "mine", "other"))
    assert opened.documents == {"mine": ITEMS, "other": ITEMS}
    model = tiny_model("llama")

    def run(**settings: int | None) -> list[float]:
        found = score_tasks(model, tiny_tokenizer(), opened, ["mine"], bos=True, batch_size=4,
                            **settings)["mine"]  # type: ignore[arg-type]
        return found.samples["acc"][0]

    everything = run()
    assert len(everything) == ITEMS
    sampled = run(sample=12)
    assert sampled == run(sample=12)
    assert len(sampled) == 12
    assert run(sample=12, seed=5) != sampled or run(sample=12, seed=6) != sampled
    assert run(sample=12, limit=5) == everything[:5]
    assert run(sample=40) == everything


def test_the_report_says_how_many_documents_there_were(tmp_path: Path, text_file: Path) -> None:
    recipe = asking(task_folder(tmp_path / "tasks", "mine"), f"evaluate.text={text_file}", "evaluate.tasks=[mine]",
                    "evaluate.sample=6", "evaluate.divergence_rows=2", "evaluate.divergence_length=16")
    require_tasks_possible(recipe)
    report = evaluate([Candidate("sink_aware", "x", lambda: tiny_model("llama"), 1, 4.0)], tiny_tokenizer(), recipe,
                      model="tiny")
    assert (report.evaluation["documents: mine"], report.evaluation["documents available: mine"]) == (6, ITEMS)
    assert report.evaluation["sample"] == 6
    assert set(report.rows[0].tasks) == {"mine"}


@pytest.mark.parametrize(("broken", "words"), [
    ("", "holds no lm-eval task file"), ("task: [", "is not YAML"), ("- a\n", "no mapping"),
    ("task: sink_cloze\n", "another name"), ("task: piqa\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
                                             "    test: nowhere.jsonl\n", "reads nowhere.jsonl, and there is no"),
    (None, "is no folder")])
def test_a_folder_that_is_no_good_is_refused(tmp_path: Path, broken: str | None, words: str) -> None:
    folder = tmp_path / "tasks"
    if broken is not None:
        folder.mkdir()
    if broken:
        (folder / "one.yaml").write_text(broken, encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        require_tasks_possible(asking(folder))


def test_two_tasks_of_one_name_and_data_that_is_no_data(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "twice", "mine")
    (folder / "again.yaml").write_text("task: mine\n", encoding="utf-8")
    with pytest.raises(RequestError, match="both define the task 'mine'"):
        require_tasks_possible(asking(folder))
    folder = task_folder(tmp_path / "data", "mine")
    (folder / "items.jsonl").write_text("no json\n", encoding="utf-8")
    with pytest.raises(RequestError, match="cannot load the task 'mine'"):
        require_tasks_possible(asking(folder, "evaluate.tasks=[mine]"))


@pytest.mark.parametrize("command", ["run", "eval"])
def test_the_command_line_refuses_in_one_sentence(tmp_path: Path, text_file: Path, command: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    model = model_folder(tmp_path / "model")
    given = (["run", "-m", str(model), "-o", str(tmp_path / "out"), "--set", f"calibration.text={text_file}"]
             if command == "run" else ["eval", str(model)])
    result = CliRunner().invoke(app, [*given, "--task-folder", str(empty), "--set", f"evaluate.text={text_file}"])
    assert isinstance(result.exception, RequestError)
    assert "holds no lm-eval task file" in str(result.exception)
    assert result.exception.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_groups_and_tags_of_the_folder_are_known_by_name(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", "mine", "other")
    (folder / "group.yaml").write_text("group: both\ntask: [mine, other]\n", encoding="utf-8")
    other = yaml.safe_load((folder / "other.yaml").read_text(encoding="utf-8")) | {"tag": ["some"]}
    (folder / "other.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    assert tasks_in(folder) == (["mine", "other"], ["both", "some"])
    for name in ("both", "some"):
        wanted = wanted_tasks(asking(folder, f"evaluate.tasks=[{name}]").evaluate)
        assert wanted.names == [name]
        require_tasks_possible(asking(folder, f"evaluate.tasks=[{name}]"))
    assert wanted_tasks(asking(folder, "evaluate.tasks=[]").evaluate).names == ["mine", "other"]


def test_a_task_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", "mine")
    content = yaml.safe_load((folder / "mine.yaml").read_text(encoding="utf-8")) | {"unsafe_code": True}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(RequestError, match="'mine' runs code that a model writes"):
        require_tasks_possible(asking(folder, "evaluate.tasks=[mine]"))


def test_a_metric_of_pairs_that_are_no_numbers_is_kept_as_it_is() -> None:
    samples = [{"doc_id": 0, "bleu": ("w1", "w2"), "mine": 0.5}, {"doc_id": 1, "bleu": ("w3", "w4"), "mine": 0.7}]
    found = _result(samples, {"bleu,none": 12.0, "mine,none": 0.6}, {"bleu": True, "mine": None})
    assert {name: one.value for name, one in found.measures.items()} == {"bleu": 12.0, "mine": 0.6}
    assert set(found.samples) == {"mine"}
    assert found.higher_is_better == {"bleu": True, "mine": True}


def test_a_perplexity_that_no_float_holds_takes_nothing_else_with_it(tmp_path: Path) -> None:
    """A text without spaces is one word, whose likelihood is next to nothing."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text(json.dumps({"text": "w8 " * 400}) + "\n", encoding="utf-8")
    content = {"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
               "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")},
                                  "cache_dir": str(folder / "cache")},
               "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [
                   {"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    opened = open_tasks(["mine"], folder)
    (task,) = opened.tasks["mine"]
    task.process_results = lambda _, results: {"word_perplexity": (results[0], 1), "bits_per_byte": (results[0], 1200)}
    found = score_tasks(tiny_model("llama"), tiny_tokenizer(), opened, ["mine"], bos=True, batch_size=1)["mine"]
    assert set(found.measures) == {"bits_per_byte"}
    assert math.exp(1) == pytest.approx(math.e)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.bool_, np.int64, float, bool], ids=str)
def test_metrics_of_any_kind_of_number_count(number: Any) -> None:
    samples = [{"doc_id": place, "acc": number(place % 2), "filter": "none"} for place in range(10)]
    found = _result(samples, {"acc,none": np.float32(0.5), "acc_stderr,none": 0.1}, {"acc": True})
    assert found.measures["acc"].value == 0.5
    assert found.measures["acc"].stderr == pytest.approx(0.16, abs=0.01)
    assert found.samples["acc"] == ([0.0, 1.0] * 5, [1.0] * 10)


def test_a_task_that_generates_more_than_the_model_has_positions_for_is_refused_at_once(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", "mine")
    content = yaml.safe_load((folder / "mine.yaml").read_text(encoding="utf-8"))
    content |= {"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 300},
                "metric_list": [{"metric": "exact_match"}]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = asking(folder, "evaluate.tasks=[mine]")
    require_tasks_possible(recipe, positions=301)
    with pytest.raises(RequestError, match="'mine' generates up to 300 tokens, and this model reads 300"):
        require_tasks_possible(recipe, positions=300)
