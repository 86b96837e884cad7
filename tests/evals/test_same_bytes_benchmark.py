"""The guard of equal bytes: two runs print the same lines, and a line that differs is found."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "evals" / "benchmarks" / "same_bytes.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--models", "llama", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_checkpoint_that_differs_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    maps, before = ["--sink-maps", str(tmp_path / "maps")], tmp_path / "before.txt"
    run(monkeypatch, *maps, "--recipes", "w8a16-sink-rtn", "int8-bnb-sink")
    before.write_text(capsys.readouterr().out)
    lines = before.read_text().splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == ["llama w8a16-sink-rtn", "llama int8-bnb-sink"]
    run(monkeypatch, *maps, "--recipes", "w8a16-sink-rtn", "--compare", str(before))
    before.write_text("\n".join([lines[0][:-4] + "0000", lines[1]]))
    with pytest.raises(SystemExit):
        run(monkeypatch, *maps, "--recipes", "w8a16-sink-rtn", "int8-bnb-sink", "--compare", str(before))
    assert capsys.readouterr().err.splitlines()[-3:] == ["2 lines differ:", f"- {lines[0][:-4]}0000", f"+ {lines[0]}"]
