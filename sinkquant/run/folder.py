"""A run's folder while the run goes on: locked, written aside, resumed where it is the same run, renamed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.artifacts.base import real_place, write_atomically
from sinkquant.errors import RequestError
from sinkquant.formats import versions
from sinkquant.formats.output import UNDONE, beside, put_in_place, require_free
from sinkquant.models.corpus import text_digest
from sinkquant.models.folder import RUN_MODEL
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND

LOG = logging.getLogger("sinkquant")
MODEL, CONTROL = RUN_MODEL, "model-control"
"""Where a run's folder keeps the checkpoint, and its sink-unaware control of the same size."""
MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "sinkquant/manifest@1"


class WorkFolder:
    """Where `partial_folder` says. Its manifest holds the key of the run and the seconds that every stage has taken.

    `processor`: stage -> seconds that all processors together spent on it in this attempt. `peaks`: stage -> the most
    bytes that this process had in memory until its end.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count a stage's seconds, over all attempts of a resumed run."""
        start, busy = time.monotonic(), time.process_time()
        yield
        took = time.monotonic() - start
        self.processor[stage] = round(self.processor.get(stage, 0.0) + time.process_time() - busy, 3)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + took, 3)
        self.peaks[stage] = peak_resident()
        self.write_manifest()
        LOG.info("%s took %.1f s (%.1f of processors); peak of memory so far %.2f GB", stage, took,
                 self.processor[stage], self.peaks[stage] / 1e9)

    def what_is_left(self) -> str:
        """A sentence on what a run that stopped has left behind, and how to go on."""
        if not self.path.exists():
            return "nothing half-written was left; --resume would have kept the stages that were done."
        if not (self / MANIFEST).is_file():
            return f"{self.path} could not be removed; remove it."
        done = f" ({', '.join(self.seconds)})" if self.seconds else ""
        return f"{self.path} keeps what was done{done}; the same command with --resume goes on from there."

    def write_manifest(self) -> None:
        """Atomic, so that a run that is killed here can be resumed."""
        content = {"schema": MANIFEST_SCHEMA, "key": self.key, "seconds": self.seconds}
        write_atomically(self.path / MANIFEST, json.dumps(content) + "\n")


def peak_resident() -> float:
    """The most bytes that this process has had in memory."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def partial_folder(target: Path) -> Path:
    """Where a run's folder lies until the run is done: `<target>.partial`, or inside a folder that is there already."""
    place = real_place(target)
    return beside(place, f"{place.name}.partial", UNDONE)


@contextlib.contextmanager
def work_folder(target: Path, key: str, resume: bool) -> Iterator[WorkFolder]:
    """`partial_folder` while the run goes on, `target` once it is done; with `resume` it outlives a failure, and the
    error carries a note that says so.

    Raises:
        RequestError: there is something to resume, and it was another run; another run is at work there.
    """
    place, work = real_place(target), WorkFolder(partial_folder(target), key)
    with locked(work.path):
        require_free(target)  # a run that had the lock may have finished
        _begin(work, resume)
        try:
            with _log_file(work.path):
                yield work
            put_in_place(work.path, place)
            (place / MANIFEST).unlink()
        except BaseException as error:
            if not resume:
                shutil.rmtree(work.path, ignore_errors=True)
            if resume or isinstance(error, KeyboardInterrupt):
                error.add_note(work.what_is_left())
            raise


def _begin(work: WorkFolder, resume: bool) -> None:
    manifest = work / MANIFEST
    if resume and manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found.get("key") != work.key:
            raise RequestError(f"{work.path} was made with another recipe, model, text, --plan-only or version of the "
                               "packages; remove it or run without --resume.")
        work.seconds = found["seconds"]
        left_over = list(work.path.glob(".*"))  # what a killed process was writing
    else:
        left_over = list(work.path.iterdir())
    for path in left_over:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    work.write_manifest()


def run_key(recipe: Recipe, folder: Path, plan: Plan | None = None, sink_map: SinkMap | None = None,
            backend: str = DEFAULT_BACKEND) -> str:
    """A hash of all that decides a run's result: recipe, edited plan and sink map that were given, model files, texts,
    versions of the packages, those of a backend among them."""
    given = [recipe.model_dump(mode="json"), plan and plan.to_json(), sink_map and sink_map.to_json(),
             versions(backend)]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns};".encode())
    for text in (recipe.calibration.text, *([plan.calibration.text] if plan else [])):
        digest.update(text_digest(text, "calibration"))
    digest.update(text_digest(recipe.evaluate.text, "evaluation"))
    return digest.hexdigest()


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        LOG.info("stopped: %s", type(error).__name__, exc_info=error)
        raise
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        handler.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder where it is not there yet, and keep all other runs out of it. The lock is the folder's own (flock),
    so that it goes with the process, however that ends, and moves with the folder.

    Raises:
        RequestError: another run holds it, or the folder cannot be made.
    """
    handle = _open(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing came of it
        os.close(handle)


def _open(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise RequestError(f"cannot write into {folder}: {error.strerror}; name another output folder.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise RequestError(f"another run is writing into {folder}; wait for it or name another output "
                               "folder.") from error
        except OSError as error:
            LOG.warning("%s cannot be locked (%s): start no other run into it", folder, error.strerror)
        if folder.is_dir() and os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        os.close(handle)  # the run that held it has given the folder its place meanwhile
