"""Sensitivities in a file: reused for the same request, refused for another one, the same from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model
from sinkmaps import STOP, sink_map_of
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant import Recipe, RequestError, find_sensitivity
from sinkquant.artifacts import Sensitivity
from sinkquant.models import ActivationStore, Decoder, open_model

SMALL = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=2",
         "sensitivity.length=16", "sensitivity.measure_length=8", "sensitivity.bits=[4]"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "words.txt"
    path.write_text(random_text(200))
    return path


def found(model: PreTrainedModel, text: Path, cache: Path, *assignments: str,
          store: ActivationStore | None = None) -> Sensitivity:
    recipe = Recipe().replace([f"calibration.text={text}", *SMALL, *assignments])
    return find_sensitivity(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)), recipe, cache, store)


def test_the_same_request_reads_the_file_and_another_one_is_refused(
        tiny: PreTrainedModel, tiny_folder: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "sensitivity.json"
    first = found(tiny, short, cache)
    written = cache.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("estimated again")

    monkeypatch.setattr("sinkquant.sensitivity.find.estimate", never)
    for again in ("weights.bits=2", "sensitivity.score=diagonal", "weights.tune=7", "weights.distill=9",
                  "weights.descent=1"):  # candidates know nothing of what comes after the first rounding
        assert found(tiny, short, cache, again) == first
    assert found(open_model(tiny_folder), short, cache) == first
    for other in ("sensitivity.bits=[3]", "weights.group_size=64", "seed=1"):
        with pytest.raises(RequestError, match="sensitivities of another model, text or recipe"):
            found(tiny, short, cache, other)
    with pytest.raises(RequestError, match="sensitivities of another model"):
        found(tiny_model("llama", seed=1), short, cache)
    recipe = Recipe().replace([f"calibration.text={short}", *SMALL])
    with pytest.raises(RequestError, match="sensitivities of another model"):
        find_sensitivity(tiny, tiny_tokenizer(), sink_map_of(Decoder.of(tiny), tokens=(STOP,)), recipe, cache)
    assert cache.read_bytes() == written


def test_a_model_on_disk_and_hidden_states_on_disk_give_the_same_numbers(
        tiny: PreTrainedModel, tiny_folder: Path, short: Path, tmp_path: Path) -> None:
    one = found(tiny, short, tmp_path / "one.json", "sensitivity.measure_rows=1")
    found(open_model(tiny_folder), short, tmp_path / "two.json", "sensitivity.measure_rows=1",
          store=ActivationStore(tmp_path, 1))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert one.ranking is not None
    assert not list(tmp_path.glob(".*"))


def test_a_text_too_short_is_refused_and_fewer_rows_are_noted(tiny: PreTrainedModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(random_text(40))
    (note,) = found(tiny, text, tmp_path / "x.json", "sensitivity.rows=50").notes
    assert "rows of 16 tokens for the sensitivities; 50 were asked for" in note
    text.write_text("a")
    with pytest.raises(RequestError, match="shorter than one row"):
        found(tiny, text, tmp_path / "y.json")


def test_what_cannot_be_measured_or_written_is_refused_at_once(tiny: PreTrainedModel, short: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkquant.sensitivity.find.estimate", lambda *_: pytest.fail("began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="nothing can be written into"):
        found(tiny, short, tmp_path / "file" / "x.json")
    with pytest.raises(RequestError, match="not in memory"):
        found(tiny_model("llama").to("meta"), short, tmp_path / "x.json")


def test_a_file_in_the_home_folder_is_found_again(tiny: PreTrainedModel, short: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = found(tiny, short, Path("~/x.json"))
    assert (tmp_path / "x.json").is_file()
    monkeypatch.setattr("sinkquant.sensitivity.find.estimate", lambda *_: pytest.fail("estimated again"))
    assert found(tiny, short, Path("~/x.json")) == first


def test_a_model_in_training_has_the_same_measured_losses(short: Path, tmp_path: Path) -> None:
    """GPT-2 drops out a tenth of its activations by default."""
    model = tiny_model("gpt2", resid_pdrop=0.5)
    measured = found(model, short, tmp_path / "one.json", "sensitivity.measure_rows=1")
    assert found(model.train(), short, tmp_path / "two.json", "sensitivity.measure_rows=1") == measured
    assert model.training
