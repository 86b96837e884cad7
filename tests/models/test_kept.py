"""What is kept between commands is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkquant.models.kept import kept


def test_a_folder_that_was_deleted_in_part_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkquant.models.kept.cached_assets_path", lambda *_, **__: tmp_path / "assets")
    made: list[Path] = []

    def make(aside: Path) -> dict[str, str]:
        made.append(aside)
        (aside / "weights").write_text("whole")
        return {"of": "something"}

    def place() -> Path:
        return kept("things", "key", "mark.json", 0, make, "keep it")

    folder = place()
    for path in list(folder.iterdir()):
        path.unlink()
    assert (place() / "weights").read_text() == "whole"
    assert place() == folder
    assert len(made) == 2
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["key"]
