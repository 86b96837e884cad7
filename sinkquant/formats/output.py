"""Where a folder is written until it is whole, and how it then gets its place."""

from __future__ import annotations

import shutil
from pathlib import Path

from sinkquant.artifacts.base import real_place, require_writable
from sinkquant.errors import RequestError

UNDONE = "run.partial"
"""The folder of an unfinished run inside an output folder that was there before it."""


def require_free(folder: Path) -> None:
    """Raises RequestError if something stands where the folder is to be written, or nothing can be; what an unfinished
    run left there does not count."""
    place = real_place(folder)
    if place.is_file() or (place.is_dir() and any(path.name != UNDONE for path in place.iterdir())):
        raise RequestError(f"the output folder {folder} exists and is not empty; name another or remove it.")
    require_writable(folder)


def beside(place: Path, name: str, inside: str) -> Path:
    """Where to write until all is done: `name` beside a place that is free, `inside` a folder that is there already. So
    a current folder, a mount point and a folder whose parent is not ours are filled and never replaced."""
    other = place.with_name(name)
    return place / inside if place.is_dir() and not other.exists() else other


def put_in_place(aside: Path, place: Path) -> None:
    """Give a finished folder its place, whose folder may be there already, and empty."""
    if not place.is_dir():
        aside.rename(place)
        return
    for path in sorted(aside.iterdir()):
        shutil.move(path, place / path.name)
    aside.rmdir()
