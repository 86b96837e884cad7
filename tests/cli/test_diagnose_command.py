"""`quantize-model diagnose` as a user runs it: tables, JSON, a file, several models, a quantized version."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from families import tiny_model
from planter import Plant, plant
from sinkmaps import sink_map_of
from small_runs import beginning
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant import Diagnosis, Recipe, load, plan, quantize, save
from sinkquant.cli import main
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.inputs import switch_of

FAST = ["--set", "detect.rows=16", "--set", "detect.long_rows=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model of 64 positions."""
    place = tmp_path_factory.mktemp("planted") / "model"
    plant(tiny_model("llama", max_position_embeddings=64), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0)
          ).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["quantize-model", "diagnose", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_json_and_a_file_beside_a_quantized_version(folder: Path, text_file: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "diagnosis.json"
    assert run(monkeypatch, str(folder), "--against", str(folder), "--text", str(beginning(text_file)), "--json", "-o",
               str(output), *FAST) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "sinkquant/diagnosis@1"
    saved = Diagnosis.load(output)
    assert saved.model_dump(mode="json", by_alias=True) == printed
    assert saved.fidelity is not None
    assert saved.fidelity.verdict == "kept"
    assert saved.against is not None
    assert saved.against.sink_rates == saved.sink_rates


def test_a_quantized_version_is_read_through_its_prefix_and_block_by_block(
        folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(folder)
    recipe = Recipe().replace(["weights.method=rtn", "weights.group_size=32", "activations.format=int8",
                               "kv_cache.prefix=bos", "kv_cache.group_size=32", "calibration.rows=4",
                               "calibration.length=32", f"calibration.text={text_file}"])
    known = sink_map_of(Decoder.of(model))
    quantize(model, plan(model, known, recipe), tokenizer)
    made = Path(save(model, tokenizer, tmp_path / "q", known, recipe))
    seen: list[tuple[int, ...]] = []

    def look(*_: object, against: PreTrainedModel, kept: list[int] | None, **__: object) -> None:
        seen.append(switch_of(against).prefix)
        raise RequestError(f"seen, with {kept}")

    monkeypatch.setattr(sys.modules["sinkquant.diagnose"], "diagnose", look)
    assert run(monkeypatch, str(folder), "--against", str(made), "--text", str(text_file)) == 2
    assert seen == [(1,)]


def test_a_sink_map_made_before_is_taken_and_folders_of_its_files_are_made(
        folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    made = sink_map_of(Decoder.of(AutoModelForCausalLM.from_pretrained(folder)))
    made.save(tmp_path / "map.json")
    found, plot = tmp_path / "a" / "diagnosis.json", tmp_path / "b" / "depth.html"
    assert run(monkeypatch, str(folder), "--sink-map", str(tmp_path / "map.json"), "-o", str(found), "--depth-plot",
               str(plot), "--text", str(beginning(text_file)), "--json", *FAST) == 0
    assert json.loads(capsys.readouterr().out)["sinks"] == [sink.model_dump(mode="json") for sink in made.tokens]
    assert Diagnosis.load(found).depth is not None
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_several_models_are_compared(folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, str(folder), str(folder), "--text", str(beginning(text_file)), *FAST) == 0
    shown = capsys.readouterr().out
    assert "Models compared" in shown
    assert shown.count("Rank collapse and smoothness") == 2


@pytest.mark.parametrize(("arguments", "words"), [
    (["demo", "demo", "-o", "x.json"], "are for one model"), (["no-such-model"], "is not a model folder"),
    (["demo", "--text", "no-such-file"], "cannot read"),
    (["demo", "--against", "no-such-model"], "not a model folder")])
def test_wrong_requests_are_one_sentence(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
