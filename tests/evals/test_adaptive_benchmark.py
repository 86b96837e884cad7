"""The benchmark of the stopping rule: divergences of a run's pairs, and what the rule makes of them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import model_folder, small_recipe

import sinkquant as sq

SCRIPT = Path(__file__).parents[2] / "evals" / "benchmarks" / "adaptive.py"


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_verdicts_and_errors_of_known_divergences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    b = np.exp(generator.normal(-5, 0.4, 64))
    apart, alike = b * np.exp(generator.normal(0.4, 0.1, 64)), b * np.exp(generator.normal(0, 0.02, 64))
    known = {"clear": [apart.tolist(), b.tolist()], "worse": [b.tolist(), apart.tolist()],
             "nothing": [alike.tolist(), b.tolist()]}
    (tmp_path / "known.json").write_text(json.dumps(known))
    _run(monkeypatch, "--known", str(tmp_path / "known.json"), "--trials", "400", "--markdown",
         str(tmp_path / "table.md"))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in
            (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")}
    assert rows["clear"][2:5] == ["pays", "20 of 20", "0"]
    assert rows["worse"][2:5] == ["does not pay", "20 of 20", "0"]
    assert rows["nothing"][4] == "0"
    assert rows["clear"][5].endswith("(8, 16)")
    assert all(float(rows[name][6].strip("| ")) <= 0.09 for name in known)


def test_the_pairs_of_a_run_are_measured(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, "weights.method=rtn", "kv_cache.window=16", "kv_cache.length=128",
                          "evaluate.fidelity=false")
    sq.run(recipe, model, tmp_path / "small")
    _run(monkeypatch, str(tmp_path / "small"), "--model", str(model), "--rows", "6", "--trials", "2", "-o",
         str(tmp_path / "pairs.json"))
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert set(found) == {f"small: {a} - {b}" for a, b in (("control", "sink_aware"), ("weights_control", "weights"),
                                                          ("cache_control", "cache"))}
    assert {len(values) for pair in found.values() for values in pair} == {6}
    report = sq.Report.load(tmp_path / "small" / "report.json")
    assert report.row("weights").tasks["divergence"]["kl"].value > 0
