"""What installed packages bring through Python's entry points: the one place that looks for them."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from sinkquant.errors import RequestError, first_line

Kind = TypeVar("Kind")


def brought(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group, by name; nothing of them is imported."""
    return _found(group, tuple(sys.path))


def loaded_class(group: str, name: str, kind: type[Kind]) -> type[Kind]:
    """What an entry point names, where that is a class whose objects the caller makes.

    Raises:
        RequestError: it is something else.
    """
    found = _imported(brought(group)[name])
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise RequestError(_wrong(group, name, f"subclass of {kind.__module__}.{kind.__name__}"))
    return found


def loaded(group: str, name: str, kind: type[Kind]) -> Kind:
    """What an entry point names: an instance of a class, or the class of one.

    Raises:
        RequestError: it is something else.
    """
    found = _imported(brought(group)[name])
    made = found() if isinstance(found, type) else found
    if not isinstance(made, kind):
        raise RequestError(_wrong(group, name, f"{kind.__module__}.{kind.__name__}"))
    return made


def _imported(point: EntryPoint) -> object:
    try:
        return point.load()
    except Exception as error:  # whatever a package does when it is imported
        package = "the package that brings it" if point.dist is None else point.dist.name
        raise RequestError(f"the entry point {point.name!r} of {point.group} cannot be imported "
                           f"({first_line(error)}); mend or remove {package}.") from error


def _wrong(group: str, name: str, expected: str) -> str:
    return f"the entry point {name!r} of {group} is no {expected}; mend the package that brings it."


@lru_cache(maxsize=8)
def _found(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """path: `sys.path`, which is all that it depends on."""
    return {point.name: point for point in entry_points(group=group)}
