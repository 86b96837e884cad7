"""What installed packages bring through Python's entry points: the one place that looks for them."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from sinkquant.errors import RequestError

Kind = TypeVar("Kind")


def brought(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group, by name; nothing of them is imported."""
    return _found(group, tuple(sys.path))


def loaded(group: str, name: str, kind: type[Kind]) -> Kind:
    """What an entry point names: an instance of a class, or the class of one.

    Raises:
        RequestError: it is something else.
    """
    found = brought(group)[name].load()
    made = found() if isinstance(found, type) else found
    if not isinstance(made, kind):
        raise RequestError(f"the entry point {name!r} of {group} is no {kind.__module__}.{kind.__name__}; mend the "
                           "package that brings it.")
    return made


@lru_cache(maxsize=8)
def _found(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """path: `sys.path`, which is all that it depends on."""
    return {point.name: point for point in entry_points(group=group)}
