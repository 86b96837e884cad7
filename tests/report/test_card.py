"""The card of a checkpoint says what it is made of, what it costs, and nothing about the machine it was made on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from families import tiny_model
from kv_plans import kv_plan

from sinkquant import Plan, Report, SinkMap
from sinkquant.report import write
from sinkquant.report.render import hub_id


def head_and_body(folder: Path) -> tuple[dict[str, object], str]:
    _, head, body = (folder / "model" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_checkpoint_gets_a_card(tmp_path: Path, report: Report, sink_map: SinkMap, plan: Plan) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path, report.model_copy(update={"model": "some/Model-1B"}), sink_map, plan)
    head, body = head_and_body(tmp_path)
    assert head == {"base_model": "some/Model-1B", "base_model_relation": "quantized", "library_name": "transformers",
                    "pipeline_tag": "text-generation", "tags": ["quantized", "compressed-tensors", "sinkquant"]}
    assert "# Model-1B, quantized by w4" in body
    assert "1,000 bytes" in body
    assert "Protection pays on this model: it does." in body
    assert "| control | 1,000 |" in body
    assert "| sink-aware | 1,000 |" in body
    assert "- a note of the run" in body


def test_a_card_counts_a_gguf_file_s_own_bytes_and_says_what_loads_the_weights_alone(
        tmp_path: Path, report: Report, sink_map: SinkMap, plan: Plan) -> None:
    (tmp_path / "model").mkdir()
    rows = [row.model_copy(update={"weight_bytes": 3000}) if row.name == "unquantized" else row for row in report.rows]
    packed = plan.model_copy(update={"kv_cache": kv_plan(tiny_model("llama"))})
    write(tmp_path, report.model_copy(update={"rows": rows}), sink_map, packed)
    body = head_and_body(tmp_path)[1]
    assert "those of the unquantized model take 3,000." in body
    assert "\nWith a KV cache in 16 bits its weights load in transformers." in body
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "bytes predicted; with a KV cache in 16 bits its weights load in transformers.\n" in markdown


def test_a_local_folder_is_no_base_model(tmp_path: Path, report: Report, sink_map: SinkMap, plan: Plan) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path, report.model_copy(update={"model": "/home/me/models/mine"}), sink_map, plan)
    head, body = head_and_body(tmp_path)
    assert "base_model" not in head
    assert "/home/me" not in body
    assert "# mine, quantized by w4" in body


@pytest.mark.parametrize(("model", "known"), [
    ("org/name", True), ("org/name-1.5B", True), ("demo", False), ("./org/name", False), ("a/b/c", False),
    ("../name", False), ("models", False)])
def test_only_ids_are_ids(model: str, known: bool) -> None:
    assert (hub_id(model) == model) is known


def test_a_folder_of_that_name_is_meant_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id("org/name") is None


@pytest.mark.parametrize("there", [True, False])
def test_a_card_that_is_written_again_keeps_its_base_model(there: bool, tmp_path: Path, report: Report,
                                                           sink_map: SinkMap, plan: Plan,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path that is gone looks like an id on a hub, and an id may meet a folder of that name."""
    (tmp_path / "model").mkdir()
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "model")[::1 if there else -1]:
        monkeypatch.chdir(place)
        write(tmp_path, report.model_copy(update={"model": "org/name"}), sink_map, plan)
        assert head_and_body(tmp_path)[0].get("base_model") == (None if there else "org/name")
