"""The benchmarks of depth: a line for everything that was asked, none measured twice, drafts that change no token."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from families import tiny_model
from planter import Plant, plant
from small_runs import small_recipe
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.detect import detect

FOLDER = Path(__file__).parents[2] / "evals" / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / script), run_name="__main__")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A model of five blocks with a sink, and its sink map beside it."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    model = plant(tiny_model("llama", num_hidden_layers=5), Plant(1, None, frozenset({0, 2}), 20, 1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = small_recipe(text_file, "detect.super_weights=false")
    detect(model, tiny_tokenizer(), recipe=recipe).save(folder.parent / "sinkmap.json")
    return folder


def test_a_line_for_blocks_heads_and_bits(source: Path, text_file: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"task": "toy", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}}, "doc_to_text": "context",
            "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    (tmp_path / "toy.jsonl").write_text("\n".join(
        json.dumps({"context": f"a sentence {number}", "choices": [" one", " two"], "answer": number % 2})
        for number in range(6)))
    sq.run(small_recipe(text_file, "weights.method=rtn", "detect.super_weights=false", "evaluate.skip=true"),
           model=str(source), output=str(tmp_path / "rounded"))
    command = ["depth.py", str(source), "--sink-map", str(source.parent / "sinkmap.json"), "--choice",
               str(tmp_path / "choice.json"), "--lines", str(tmp_path / "lines.jsonl"), "--text", str(text_file),
               "--rows", "5", "--length", "32", "--blocks", "1", "2", "--shares", "0.2", "--bits", "4", "--mixed", "1",
               "--seeds", "0", "--mixed-heads", "4:0.2", "--checkpoints", f"rounded={tmp_path / 'rounded'}",
               "--tasks", "toy", "--task-folder", str(tmp_path), "--limit", "4"]
    run(monkeypatch, *command)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    names = [(line["labels"]["what"], line["labels"]["by"], line["labels"]["count"]) for line in lines]
    assert len(names) == len(set(names))
    assert {name for what, name, _ in names if what == "blocks"} >= {"measured", "influence", "last", "random 0",
                                                                     "emerges"}
    assert {name for what, name, _ in names if what == "heads"} == {"mixing", "sink score", "norm", "random 0",
                                                                    "reading 0"}
    assert {("blocks and weights", "4 bits", "1"), ("heads and weights", "4 bits, mixing", "20%"),
            ("checkpoint", "rounded", "")} <= set(names)
    size = {name: line["size"] for name, line in zip(names, lines, strict=True)}
    assert size["blocks and weights", "4 bits", "1"] < size["weights", "4 bits", ""] < size["blocks", "measured", "2"]
    assert names[0] == ("whole", "", "")
    assert all(min(line["kl"]) > 0 for line in lines[1:])  # in the second batch too
    assert all(len(line["scores"]["toy"]) == 4 for line in lines)
    capsys.readouterr()
    run(monkeypatch, *command)
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(lines)
    assert capsys.readouterr().out.startswith("| what | by | count |")


def test_drafts_change_no_token(source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.json").write_text('{"kept": [0, 1, 4]}')
    run(monkeypatch, "self_speculation.py", str(source), "--exits", "2", "9", "--drafts", "2", "--kept",
        str(tmp_path / "kept.json"), "--prompts", "1", "--prompt", "16", "--tokens", "6", "--calibration",
        str(text_file), "--evaluation", str(text_file), "--lines", str(tmp_path / "lines.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert {(line["text"], line["draft"]) for line in lines} == {
        (text, draft) for text in ("calibration", "evaluation") for draft in ("exit 2", "shorter, 3 blocks")}
    assert all(1 <= line["per_pass"] <= 3 for line in lines)
    assert "| exit 2 | 2 | evaluation |" in capsys.readouterr().out


def test_a_line_for_heads_of_more_bits(source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "head_bits.py", str(source), "--sink-map", str(source.parent / "sinkmap.json"), "--rows", "2",
        "--length", "96", "--heldout", str(text_file), "--calibration", str(text_file), "--shares", "0.4", "--seeds",
        "0", "--loss-rows", "1", "--group-size", "32", "--lines", str(tmp_path / "lines.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    found = {(line["labels"]["what"], line["labels"]["by"]): sum(line["kl"]) for line in lines}
    assert {what for what, _ in found} == {"cache", "weights"}
    assert {name for _, name in found} == {"none", "all", "reading", "resting", "random 0", "loss"}
    for what in ("cache", "weights"):
        assert found[what, "all"] < found[what, "reading"] < found[what, "none"]
    sizes = {line["labels"]["by"]: line["size"] for line in lines if line["labels"]["what"] == "cache"}
    assert sizes["none"] < sizes["reading"] == sizes["random 0"] < sizes["all"]
