"""The race: every candidate on the same rows, its bytes taken from what it wrote."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sinkquant.artifacts import Frontier, FrontierPoint, Plan, SinkMap
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.models import Decoder, load_model
from sinkquant.policy import make_plan
from sinkquant.policy.headers import nothing_found
from sinkquant.recipe import Recipe

BENCHMARKS = Path(__file__).parents[2] / "evals" / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """An environment for the peers that are installed here anyway."""
    python = tmp_path / "peers-rounding" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_ours_and_a_peer_on_the_same_rows(tiny_folder: Path, text_file: Path, peers: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Decoder.of(load_model(tiny_folder, torch.float32)).shape("tiny")
    sink_map: SinkMap = nothing_found(shape)
    sink_map.save(peers / "map.json")
    arguments = [str(tiny_folder), "--sink-map", str(peers / "map.json"), "--work", str(peers / "work"), "--peers",
                 str(peers), "--lines", str(peers / "lines.jsonl"), "--text", str(text_file), "--calibration",
                 str(text_file), "--calibration-name", "plain", "--rows", "2", "--held-out", "2", "--only",
                 "bitsandbytes NF4", "sinkquant GPTQ, control:4", "unquantized"]
    run(monkeypatch, "race.py", *arguments)
    peer, ours, untouched = (json.loads(line) for line in (peers / "lines.jsonl").read_text().splitlines())
    assert (peer["labels"], ours["labels"]) == (
        {"candidate": "bitsandbytes NF4", "bits": "4", "calibration": "plain"},
        {"candidate": "sinkquant GPTQ, control", "bits": "4", "calibration": "plain"})
    assert peer["unquantized"] == ours["unquantized"]
    assert max(map(abs, untouched["kl"])) < 1e-6
    assert untouched["size"] == sum(p.numel() * p.itemsize for p in load_model(tiny_folder).parameters())
    assert 0 < sum(ours["kl"]) < sum(peer["kl"]) * 3
    plan: Plan = make_plan(shape, sink_map, Recipe().replace(["weights.bits=4"]))
    assert ours["size"] == checkpoint_bytes(shape, plan.formats)
    # A byte holds two codes, and 64 weights share a 4-byte scale there.
    weights = sum(linear.rows * linear.columns for linear in shape.linears.values())
    assert 0.5 * weights < peer["blocks"] < 0.6 * weights
    assert not list((peers / "work").glob("*/made.json"))


def test_a_peer_is_compared_with_the_best_of_ours_that_is_no_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    raced = [("peer A", 100, 0.4), ("peer B", 150, 0.5), ("sinkquant small", 99, 0.3), ("sinkquant, control", 90, 0.1),
             ("sinkquant large", 140, 0.01)]
    (tmp_path / "lines.jsonl").write_text("".join(
        json.dumps({"labels": {"candidate": name, "bits": "4", "text": "wiki"}, "kl": [kl, kl], "loss": [1.0, 1.0],
                    "unquantized": [1.0, 1.0], "size": size * 10**6, "blocks": size}) + "\n"
        for name, size, kl in raced))
    Frontier(model="tiny", recipe="r", points=[
        FrontierPoint(name=f"{size} MB", kind="solved", bits_per_weight=4, bytes=size * 10**6, kl=20 / size, kl_sinks=0)
        for size in (95, 120, 400)]).save(tmp_path / "frontier.json")
    run(monkeypatch, "race_page.py", str(tmp_path / "lines.jsonl"), "--text", "wiki", "--plot", str(tmp_path / "a.svg"),
        "--frontier", str(tmp_path / "frontier.json"))
    compared = capsys.readouterr().out.split("\n\n")[-1].splitlines()[2:]
    # B is larger than A and loses more; the control is no candidate of ours; what is larger does not count.
    assert compared == ["| peer A, 4 bits | 100.0 | 0.4000 | sinkquant small, 4 bits | 99.0 | 0.3000 | 0.75 |"]
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert "stroke-dasharray" in (tmp_path / "a.svg").read_text()


def test_tasks_stand_beside_one_candidate_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"a": {"acc": [1.0, 0.0] * 8, "word, nats": [2.0] * 16},
              "b": {"acc": [1.0] * 16, "word, nats": [1.5] * 16}}
    (tmp_path / "lines.jsonl").write_text("".join(
        json.dumps({"labels": {"candidate": name, "bits": "4", "text": "wiki"}, "kl": [0.1, 0.2], "loss": [1.0, 1.0],
                    "unquantized": [1.0, 1.0], "size": 10**6, "blocks": 1, "scores": found}) + "\n"
        for name, found in scores.items()))
    run(monkeypatch, "race_page.py", str(tmp_path / "lines.jsonl"), "--beside", "b")
    one, other = (row.strip("| ").split(" | ")[-2:] for row in capsys.readouterr().out.splitlines()[2:4])
    assert one[0].startswith("50 (-")
    assert one[1] == "2 (+0.5 to +0.5)"
    assert other == ["100", "1.5"]


def test_budgets_predicted_and_measured(tiny_folder: Path, text_file: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    nothing_found(Decoder.of(load_model(tiny_folder, torch.float32)).shape("tiny")).save(tmp_path / "map.json")
    run(monkeypatch, "forecast.py", str(tiny_folder), "--sink-map", str(tmp_path / "map.json"), "--megabytes", "0.11",
        "0.2", "--text", str(text_file), "--held-out", "2", "--set", f"calibration.text={text_file}",
        "weights.method=rtn", "weights.scale_search=false", "sensitivity.bits=[3,8]", "sensitivity.group_sizes=[32]",
        "sensitivity.rows=4", "sensitivity.length=16")
    cells = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    small, large = ([float(cell.replace(",", "")) for cell in (*row[1:5], row[6])] for row in cells)
    assert small[1] <= 110_000 < large[1] <= 200_000
    assert small[2] > large[2]  # predicted
    assert small[3] > large[3]  # measured
    assert small[4] == pytest.approx(small[2] / small[3], rel=0.1)  # of figures with five places

