"""A detector from outside the package: its figures stand in the sink map, on the screen and in the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from develop.toy_detector import Anisotropy
from small_runs import model_folder, small_recipe

import sinkquant as sq
from sinkquant import RequestError, SinkMap
from sinkquant.detect import Detector, Found
from sinkquant.detect.detectors import BUILT_IN, GROUP, detectors_of
from sinkquant.models import Decoder


class Tensors(Detector):
    """Finds what no file can hold."""

    fields = ("tensor",)
    null = "none"

    def result(self, found: Found) -> dict[str, Any]:
        return {"tensor": found.surveys[0].rows}


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str) -> None:
    """What `pip install` leaves of a package that brings a detector."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_a_detector_of_another_package_goes_from_detection_to_a_report(
        tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "anisotropy = develop.toy_detector:Anisotropy")
    folder = model_folder(tmp_path / "model")
    sq.run(small_recipe(text_file, "detect.super_weights=false", "evaluate.fidelity=false"), folder, tmp_path / "out")
    found = SinkMap.load(tmp_path / "out" / "sinkmap.json")
    similarity = found.extensions["anisotropy"]["similarity"]
    assert len(similarity) == found.model.layers
    assert max(map(abs, similarity)) < 5 / math.sqrt(found.model.hidden_size)  # the model is random
    assert found.nulls["anisotropy"] == Anisotropy.null
    for report in ("report.md", "report.html"):
        assert "anisotropy: similarity [" in (tmp_path / "out" / report).read_text(encoding="utf-8")


def test_it_is_asked_after_those_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "anisotropy = develop.toy_detector:Anisotropy")
    decoder = Decoder.of(sq.load(model_folder(tmp_path / "model"))[0])
    made = detectors_of(decoder, sq.Recipe())
    assert [type(one) for one in made] == [*BUILT_IN, Anisotropy]
    assert [one.name for one in made if one.name] == ["anisotropy"]


@pytest.mark.parametrize(("points", "message"), [
    ("broken = develop.toy_detector:torch", r"'broken' of sinkquant\.detectors is no subclass of .*Detector; mend the"),
    ("gone = gone_module:Detector", r"'gone' of sinkquant\.detectors cannot be imported \(No module named"),
    ("tensors = develop.test_toy_detector:Tensors", "the detector 'tensors' found cannot be written as JSON .* mend")])
def test_a_package_that_brings_something_else_is_named(points: str, message: str, tmp_path: Path, text_file: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, points)
    model, tokenizer = sq.load(model_folder(tmp_path / "model"))
    with pytest.raises(RequestError, match=message):
        sq.detect(model, tokenizer, str(text_file), small_recipe(text_file, "detect.super_weights=false"))
