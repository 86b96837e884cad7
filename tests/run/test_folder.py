"""A run's folder: wherever it is to lie, however the run ends, and whoever else wants it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import script, start
from small_runs import fingerprint

from sinkquant.errors import RequestError
from sinkquant.formats.output import UNDONE, require_free
from sinkquant.run.folder import partial_folder, work_folder


def fill(target: Path, resume: bool = False, stop: type[BaseException] | None = None) -> Path:
    """A run that writes one file and then ends well, or stops. Returns where it wrote."""
    with work_folder(target, "key", resume) as work, work.timed("detect"):
        (work / "model").mkdir(exist_ok=True)
        (work / "model" / "weights").write_text("w", encoding="utf-8")
        if stop is not None:
            raise stop
    return work.path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_is_written_beside_its_place(tmp_path: Path) -> None:
    assert fill(tmp_path / "a" / "out") == tmp_path / "a" / "out.partial"
    assert names(tmp_path / "a") == {"out"}
    assert names(tmp_path / "a" / "out") == {"model", "run.log"}


def test_a_folder_that_is_there_is_filled_and_stays_the_same_folder(tmp_path: Path) -> None:
    """As the current folder, a mount point, or one whose parent belongs to somebody else must."""
    before = os.stat(tmp_path).st_ino
    assert fill(tmp_path) == tmp_path / UNDONE
    assert os.stat(tmp_path).st_ino == before
    assert names(tmp_path) == {"model", "run.log"}
    with pytest.raises(RequestError, match="exists and is not empty"):
        fill(tmp_path)


@pytest.mark.parametrize("output", [".", "./", "../here", "../here/."])
def test_the_current_folder(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    require_free(Path(output))
    fill(Path(output))
    assert names(Path.cwd()) == {"model", "run.log"}
    assert names(tmp_path) == {"here"}


def test_the_parent_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RequestError, match=r"the output folder \.\. exists and is not empty"):
        require_free(Path(".."))


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "later").symlink_to(tmp_path / "new")
    fill(tmp_path / "out")
    fill(tmp_path / "later")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == names(tmp_path / "new") == {"model", "run.log"}


def test_another_file_system(tmp_path: Path) -> None:
    """Nothing is written outside the folder's own file system, where a rename would fail."""
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    target = other / f"sinkquant-{os.getpid()}"
    target.mkdir()
    (tmp_path / "out").symlink_to(target)
    try:
        assert fill(tmp_path / "out") == target / UNDONE
        assert names(target) == {"model", "run.log"}
    finally:
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        target.rmdir()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RequestError, match="name another output folder"):
        fill(tmp_path / "file" / "out")
    with pytest.raises(RequestError, match="exists and is not empty"):
        require_free(tmp_path / "file")


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_second_run_is_refused_and_the_first_loses_nothing(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if there:
        target.mkdir()
    second = tmp_path / "second.py"
    second.write_text(f"from pathlib import Path\nfrom sinkquant.run.folder import work_folder\n"
                      f"with work_folder(Path({str(target)!r}), 'other', True):\n    pass", encoding="utf-8")
    with work_folder(target, "key", False) as work:
        (work / "weights").write_text("w", encoding="utf-8")
        before = fingerprint(work.path)
        for resume in (False, True):
            with pytest.raises(RequestError, match="another run is writing into"):
                fill(target, resume)
        assert "another run is writing into" in start(tmp_path / "said", script, str(second)).communicate()[2]
        assert fingerprint(work.path) == before
    assert names(target) == {"weights", "run.log"}


def test_a_folder_that_another_run_has_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    """Both found it free; the second gets the lock after the first is done."""
    target = tmp_path / "out"
    require_free(target)
    fill(target)
    before = fingerprint(target)
    with pytest.raises(RequestError, match="exists and is not empty"):
        fill(target)
    assert fingerprint(target) == before
    assert not list(target.glob("*.partial"))


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_what_a_stopped_run_says_is_so(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if there:
        target.mkdir()
    with pytest.raises(KeyboardInterrupt) as stopped:
        fill(target, stop=KeyboardInterrupt)
    assert "nothing half-written was left" in stopped.value.__notes__[0]
    assert names(tmp_path) == ({"out"} if there else set())
    for stop in (KeyboardInterrupt, MemoryError):
        with pytest.raises(stop) as kept:
            fill(target, True, stop)
        place = partial_folder(target)
        assert str(place) in kept.value.__notes__[0]
        assert "--resume goes on from there" in kept.value.__notes__[0]
        assert (place / "model" / "weights").is_file()
    fill(target, True)
    assert names(target) == {"model", "run.log"}
    assert names(tmp_path) == {"out"}


def test_a_run_that_was_begun_beside_its_place_goes_on_there(tmp_path: Path) -> None:
    """Also where the empty folder was made in between."""
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fill(target, True, KeyboardInterrupt)
    target.mkdir()
    assert fill(target, True) == tmp_path / "out.partial"
    assert names(tmp_path) == {"out"}
