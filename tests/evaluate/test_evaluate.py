"""The one entry: candidates in, report out, on tiny random models with real runs of lm-eval."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Report
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.evaluate import LOCAL_TASKS, Candidate, evaluate, require_tasks_possible
from sinkquant.recipe import Recipe


def noisy(amount: float) -> PreTrainedModel:
    """The same random model with noise on the weights of its blocks."""
    model = tiny_model("llama", max_position_embeddings=256, initializer_range=0.2)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data += amount * torch.randn(parameter.shape, generator=generator)
    return model


def candidates(*chosen: str) -> list[Candidate]:
    noise = {"unquantized": 0.0, "sink_aware": 0.002, "control": 0.02}
    return [Candidate(name, name, lambda name=name: noisy(noise[name]), 1000, 4.0)  # type: ignore[misc]
            for name in chosen or noise]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text: str) -> Recipe:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(text, encoding="utf-8")
    return Recipe().replace([f"evaluate.text={path}", "evaluate.limit=5", "evaluate.divergence_rows=6",
                             "evaluate.divergence_length=64", "evaluate.bootstrap=200"])


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> Report:
    return evaluate(candidates(), tiny_tokenizer(), recipe, model="tiny")


def test_three_rows_every_metric_and_every_pair(report: Report) -> None:
    metrics = {("sink_perplexity", "word_perplexity"), ("sink_perplexity", "byte_perplexity"),
               ("sink_perplexity", "bits_per_byte"), ("sink_cloze", "acc"), ("sink_cloze", "acc_norm"),
               ("sink_recall", "acc")}
    for row in report.rows:
        found = {(task, metric) for task, measures in row.tasks.items() for metric in measures}
        assert found == metrics | (set() if row.name == "unquantized" else {("divergence", "kl")})
        assert all(measure.stderr is not None for measures in row.tasks.values() for measure in measures.values())
    sides = [("control", "sink_aware"), ("sink_aware", "unquantized"), ("control", "unquantized")]
    expected = {(*metric, *side) for metric in metrics for side in sides} | {("divergence", "kl", *sides[0])}
    assert {(p.task, p.metric, p.a, p.b) for p in report.paired} == expected
    for pair in report.paired:
        assert pair.low <= pair.difference <= pair.high
        assert pair.documents == (6 if pair.task == "divergence" else 5)
        assert pair.higher_is_better == pair.metric.startswith("acc")


def test_the_report_says_what_was_run(report: Report, recipe: Recipe) -> None:
    facts = report.evaluation
    assert facts["text"] == recipe.evaluate.text
    assert (facts["rows"], facts["length"], facts["limit"], facts["seed"]) == (6, 64, 5, 0)
    assert facts["rows_start_with_bos"] is True
    assert [facts[f"documents: {task}"] for task in LOCAL_TASKS] == [5, 5, 5]
    assert Report.parse(report.model_dump(mode="json", by_alias=True), "report") == report


def test_less_noise_diverges_less_and_the_verdict_follows(report: Report) -> None:
    aware, control = (report.row(name).tasks["divergence"]["kl"].value for name in ("sink_aware", "control"))
    assert 0 < aware < control
    assert report.verdict.answer == "pays"
    assert set(report.recovery) == {"sink_aware", "control"}
    base = report.row("unquantized").tasks["sink_perplexity"]["word_perplexity"].value
    found = report.row("control").tasks["sink_perplexity"]["word_perplexity"].value
    assert report.recovery["control"]["sink_perplexity"]["word_perplexity"] == pytest.approx(base / found)


def test_same_seed_same_report(report: Report, recipe: Recipe) -> None:
    assert evaluate(candidates(), tiny_tokenizer(), recipe, model="tiny") == report


def test_only_the_baseline_and_one_more_are_in_memory(recipe: Recipe) -> None:
    alive: list[weakref.ref[Any]] = []
    peak, calls = [], []

    def load(noise: float) -> Any:
        def loader() -> PreTrainedModel:
            gc.collect()
            peak.append(sum(ref() is not None for ref in alive))
            model = noisy(noise)
            alive.append(weakref.ref(model))
            return model
        return loader

    made = [Candidate(name, name, load(0.01 * i), 1, 4.0)
            for i, name in enumerate(("sink_aware", "unquantized", "control", "more"))]
    quick = recipe.replace(["evaluate.tasks=[sink_cloze]", "evaluate.limit=2", "compute.memory_limit=1e-6"])
    found = evaluate(made, tiny_tokenizer(), quick, model="tiny",
                     progress=lambda done, total, label: calls.append((done, total, label)))
    # Once for the tasks, and but for the baseline once more for the divergence.
    assert peak == [0, 1, 1, 1, 1, 1, 1]
    assert [row.name for row in found.rows] == ["sink_aware", "unquantized", "control", "more"]
    assert [done for done, _, _ in calls] == list(range(6))
    assert {total for _, total, _ in calls} == {5}
    assert calls[0][2] == "evaluating unquantized: sink_cloze"


def test_without_baseline_or_control_nothing_is_made_up(recipe: Recipe) -> None:
    quick = recipe.replace(["evaluate.tasks=[sink_cloze]", "evaluate.limit=2"])
    found = evaluate(candidates("sink_aware"), tiny_tokenizer(), quick, model="tiny")
    assert found.paired == []
    assert found.recovery == {}
    assert found.verdict.answer == "not measured"


def test_one_row_of_text_gives_no_interval(recipe: Recipe, tmp_path: Path, text: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(text[:2_600], encoding="utf-8")
    quick = recipe.replace([f"evaluate.text={path}", "evaluate.tasks=[sink_perplexity]",
                            "evaluate.divergence_length=250", "evaluate.divergence_rows=2"])
    found = evaluate(candidates(), tiny_tokenizer(), quick, model="tiny")
    assert {p.task for p in found.paired} == {"sink_perplexity", "divergence"}
    path.write_text(text[:1_600], encoding="utf-8")
    found = evaluate(candidates(), tiny_tokenizer(), quick, model="tiny")
    assert found.evaluation["rows"] == 1
    assert "divergence" not in {p.task for p in found.paired}
    assert found.verdict.answer == "not measured"


def test_wrong_requests(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="names of their own"):
        evaluate([], tiny_tokenizer(), recipe, model="tiny")
    with pytest.raises(RequestError, match="names of their own"):
        evaluate(candidates("control", "control"), tiny_tokenizer(), recipe, model="tiny")
    with pytest.raises(RequestError, match=r"evaluate\.tasks is empty"):
        require_tasks_possible(recipe.replace(["evaluate.tasks=[]"]))
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 200, encoding="utf-8")
    with pytest.raises(RequestError, match="too short for sink_cloze"):
        require_tasks_possible(recipe.replace([f"evaluate.text={short}"]))
    # A task that is not asked for is not made, so that leaving it out helps.
    require_tasks_possible(recipe.replace([f"evaluate.text={short}", "evaluate.tasks=[sink_perplexity]"]))
    require_tasks_possible(recipe)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compared_is_named(text_file: Path) -> None:
    recipe = Recipe().replace([f"evaluate.text={text_file}", "evaluate.tasks=[sink_perplexity]", "evaluate.limit=1",
                               "evaluate.divergence_rows=2", "evaluate.divergence_length=16"])

    def measured(*models: PreTrainedModel, **more: bool) -> None:
        evaluate([Candidate(name, name, lambda model=model: model, 1, 4.0, **more)  # type: ignore[misc]
                  for name, model in zip(("unquantized", "quantized"), models, strict=True)], tiny_tokenizer(), recipe,
                 model="tiny")

    with pytest.raises(RequestError, match="quantized has a vocabulary of 256 and the baseline one of 128"):
        measured(tiny_model("llama"), tiny_model("llama", vocab_size=256))
    broken = tiny_model("llama")
    broken.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(SinkquantError, match=r"what unquantized \(unquantized\) predicts is not finite"):
        measured(broken, tiny_model("llama"), tasks_too=False)
