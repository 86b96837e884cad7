"""The JSON files: named fields, strict, diffable, and never half-written."""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from sinkmaps import BOS, STOP, sink_map_of

from sinkquant.artifacts import Artifact, Measure, Plan, Report, Row, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.report import Fidelity, Paired, Verdict
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe

SINKMAP_FIELDS = {
    "model": {"name", "architecture", "layers", "heads", "kv_heads", "hidden_size", "parameters"},
    "tokenization": {"bos_token_id", "adds_bos", "rows_start_with_bos"},
    "sink_rate": {"0.1", "0.3", "0.8"},
    "tokens": {"token_id", "text", "position", "kind", "attention", "heads", "massive"},
    "heads": {"sink_score", "value_drain", "output_norm", "no_op"},
    "modules": {"input_max", "input_max_without_sinks", "sink_energy", "sink_columns", "input_typical"},
}
"""Names that the design promises to other tools."""


@pytest.fixture(scope="module")
def artifacts() -> dict[str, Artifact]:
    decoder = Decoder.of(tiny_model("llama"))
    sink_map = sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.6}, (BOS, STOP))
    plan = make_plan(decoder.shape("tiny"), sink_map, Recipe().replace(["protect.channels=module"]))
    row = Row(name="control", path="control", weight_bytes=10, bits_per_weight=4.25,
              tasks={"task": {"acc": Measure(value=1 / 3, stderr=None)}})
    report = Report(
        model="tiny", recipe="mine", rows=[row],
        paired=[Paired(task="task", metric="acc", a="a", b="b", difference=0.1, low=-1e-17, high=0.2)],
        recovery={"control": {"task": {"acc": 0.99}}},
        fidelity=Fidelity(sink_rate={"control": {"0.3": 0.8}}, massive_peak={}, massive_ratio={}),
        verdict=Verdict(answer="pays", sentence="It pays: «ja».", gate="failed", failures=["max_divergence"]))
    return {"sinkmap": sink_map, "plan": plan, "report": report}


@pytest.mark.parametrize("kind", ["sinkmap", "plan", "report"])
def test_a_file_gives_the_same_artifact_back(artifacts: dict[str, Artifact], kind: str, tmp_path: Path) -> None:
    artifact = artifacts[kind]
    path = artifact.save(tmp_path / "deep" / f"{kind}.json")
    assert type(artifact).load(path).model_dump() == artifact.model_dump()
    assert path.read_text(encoding="utf-8") == artifact.to_json() == type(artifact).load(path).to_json()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert next(iter(content)) == "schema"
    assert content["schema"] == f"sinkquant/{kind}@1"


def test_the_fields_of_the_design_are_there(artifacts: dict[str, Artifact]) -> None:
    sink_map, plan, report = (json.loads(artifacts[kind].to_json()) for kind in ("sinkmap", "plan", "report"))
    found = {"model": sink_map["model"], "tokenization": sink_map["tokenization"], "sink_rate": sink_map["sink_rate"],
             "tokens": sink_map["tokens"][0], "heads": sink_map["heads"][0][0],
             "modules": sink_map["modules"]["model.layers.1.mlp.down_proj"]}
    for part, fields in SINKMAP_FIELDS.items():
        assert fields <= set(found[part]), part
    assert {"channels", "super_weights"} <= set(sink_map)
    assert {"bits_per_weight", "weight_bytes", "modules", "kv_cache", "predicted", "loads_in"} <= set(plan)
    assert {"bits", "group_size", "method", "keep", "columns", "activations", "reason"} <= set(
        plan["modules"]["model.layers.1.mlp.down_proj"])
    assert {"rows", "paired", "recovery", "fidelity", "verdict", "plots"} <= set(report)
    assert {"name", "weight_bytes", "kv_bits", "tasks"} <= set(report["rows"][0])
    assert {"task", "metric", "a", "b", "difference", "low", "high"} <= set(report["paired"][0])
    assert report["rows"][0]["tasks"]["task"]["acc"] == {"value": 1 / 3, "stderr": None}


def test_one_changed_number_is_one_changed_line(artifacts: dict[str, Artifact]) -> None:
    plan = artifacts["plan"]
    other = plan.model_copy(update={"weight_bytes": 1})
    lines = [line for line in difflib.unified_diff(plan.to_json().splitlines(), other.to_json().splitlines(), n=0)
             if re.match(r"[+-] ", line)]
    assert len(lines) == 2


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": "sinkquant/plan@2"}, r"'sinkquant/plan@2' where 'sinkquant/plan@1' is needed"),
    ({"schema": None}, "None where"),
    ({"surprise": 1}, "surprise"),
    ({"weight_bytes": "many"}, "weight_bytes"),
    ({"modules": {"a": {"bits": 12}}}, "modules.a.bits"),
    ({"bits_per_weight": float("nan")}, "bits_per_weight")])
def test_another_schema_or_shape_is_refused(artifacts: dict[str, Artifact], tmp_path: Path, change: dict[str, Any],
                                            message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(artifacts["plan"].to_json()) | change), encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00", "[" * 100_000])
def test_what_is_no_artifact_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sinkmap.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=r"sinkmap.json"):
        SinkMap.load(path)
    with pytest.raises(RequestError, match="cannot read"):
        SinkMap.load(tmp_path / "missing.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.json", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SinkquantError, match=r"a.json: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_follows_the_umask(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    path = write_atomically(tmp_path / "a.json", "text")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize(("section", "key", "value"), [
    ("calibration", "rows", 0), ("calibration", "batch_size", 0), ("calibration", "damping", -1.0),
    ("calibration", "descent", -1), ("kv_cache", "group_size", 0), ("kv_cache", "window", -5),
    ("kv_cache", "evict", -1), ("kv_cache", "max_exact", -1)])
def test_numbers_of_an_edited_plan_that_make_no_sense_are_refused(section: str, key: str, value: float) -> None:
    decoder = Decoder.of(tiny_model("llama"))
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), Recipe.load("w4-kv2-sink").replace(
        ["weights.group_size=32"]))
    data = json.loads(plan.to_json())
    data[section][key] = value
    with pytest.raises(RequestError, match=rf"the plan is not a valid .*: {section}.{key}"):
        Plan.parse(data, "the plan")


def test_what_is_printed_may_be_ascii(artifacts: dict[str, Artifact]) -> None:
    text = artifacts["report"].to_json(ascii_only=True)
    assert text.isascii()
    assert not artifacts["report"].to_json().isascii()
    assert json.loads(text) == json.loads(artifacts["report"].to_json())


def test_a_home_is_a_home(artifacts: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifacts["plan"].save("~/plan.json") == tmp_path / "plan.json"


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    real = write_atomically(tmp_path / "real.json", "old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomically(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert real.read_text(encoding="utf-8") == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    reading, writing = os.pipe()  # what a shell's >(command) and /dev/stdout before a | lead to
    try:
        write_atomically(Path(f"/dev/fd/{writing}"), "as it is")
        assert os.read(reading, 100) == b"as it is"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    decoder = Decoder.of(tiny_model("llama"))
    assert sink_map_of(decoder).save("~/map.json") == tmp_path / "map.json"
    assert SinkMap.load("~/map.json").model.layers == 3
    (tmp_path / "mine.yaml").write_text("seed: 3", encoding="utf-8")
    assert Recipe.load("~/mine.yaml").seed == 3
