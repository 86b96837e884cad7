"""The benchmark of methods: a line for everything that was asked, and rows that peers can be given."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sinkquant import Recipe, load, plan, quantize, save
from sinkquant.detect import detect

SCRIPT = Path(__file__).parents[2] / "evals" / "benchmarks" / "methods.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_line_for_every_method_policy_and_checkpoint(tiny_folder: Path, text_file: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"calibration.text={text_file}", "calibration.rows=4", "calibration.length=32", "detect.rows=8",
                "detect.long_rows=0", "weights.group_size=32"]
    recipe = Recipe().replace([*settings, "weights.method=rtn", "weights.bits=2"])
    model, tokenizer = load(tiny_folder)
    save(quantize(model, plan(model, detect(model, tokenizer, recipe=recipe), recipe)), tokenizer, tmp_path / "peer")
    common = [str(tiny_folder), "--text", str(text_file), "--set", *settings]
    run(monkeypatch, *common, "--bits", "2", "--methods", "rtn", "gptq", "--statistics", "all", "attention",
        "--checkpoint", f"peer:2={tmp_path / 'peer'}")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[0], line[2]) for line in lines] == [
        ("peer", "all"), ("rtn", "none"), ("gptq", "all"), ("gptq", "attention")]
    assert lines[0][3] == lines[1][3]  # the peer is the same rounding
    assert len({line[3] for line in lines}) == 3
    run(monkeypatch, *common, "--rows", str(tmp_path / "rows.safetensors"))
    rows = load_file(tmp_path / "rows.safetensors")
    assert rows["calibration"].shape == (4, 32)
    assert (rows["held_out"][:, 0] == tokenizer.bos_token_id).all()
