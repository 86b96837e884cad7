"""The benchmark of rounded inputs: a line for everything that was asked."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from small_runs import model_folder

SCRIPT = Path(__file__).parents[2] / "evals" / "benchmarks" / "activations.py"


def test_a_line_for_every_weight_input_and_scale(tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [
        str(SCRIPT), str(tiny_folder), "--text", str(text_file), "--heldout", str(text_file), "--rows", "2", "--length",
        "32", "--weights", "16", "8", "--inputs", "int4", "--scales", "all", "exclude", "token", "--set",
        "calibration.rows=2", "calibration.length=32", "detect.rows=8", "detect.long_rows=0"])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [[bits, "int4", scale] for bits in ("16", "8")
                                            for scale in ("all", "exclude", "token")]
    divergences = [float(line[3]) for line in lines]
    assert all(found > 0 for found in divergences)
    assert divergences[2] < divergences[0]  # a scale of its own for every token
    assert lines[0][5] == lines[3][5] == ""  # what the others are compared with


def test_inputs_in_blocks_have_scales_of_their_own(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setattr(sys, "argv", [
        str(SCRIPT), str(folder), "--text", str(text_file), "--heldout", str(text_file), "--rows", "2", "--length",
        "32", "--weights", "16", "4", "--inputs", "mxfp4", "--scales", "all", "block", "block-exact", "--set",
        "calibration.rows=2", "calibration.length=32", "detect.rows=8", "detect.long_rows=0"])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [[bits, "mxfp4", scale] for bits in ("16", "4")
                                            for scale in ("block", "block-exact")]
    divergences = [float(line[3]) for line in lines]
    assert all(found > 0 for found in divergences)


def test_the_page_says_what_the_sink_costs_in_tasks(monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    page, kept = SCRIPT.with_name("activations_page.py"), SCRIPT.parents[1] / "results/lines/demo-fp4-tasks.jsonl"
    monkeypatch.setattr(sys, "argv", [str(page), str(kept)])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(page), run_name="__main__")
    head, _, stored, *_ = [[cell.strip() for cell in row.split("|")[1:-1]]
                           for row in capsys.readouterr().out.splitlines()]
    assert head[-2:] == ["sink_cloze", "sink_recall"]
    assert stored[:2] == ["16", "int8, stored"]
    assert re.fullmatch(r"60\.8, 64\.2 \([+-][\d.]+ to [+-][\d.]+\)", stored[-1])
