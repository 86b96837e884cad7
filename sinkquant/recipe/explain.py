"""What is wrong with a recipe, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def near_miss(name: str, known: Iterable[str]) -> str:
    """", did you mean 'x'" where a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}" if close else ""


def explain(recipe: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a validation error as one sentence; an unknown key explains a missing one."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = list(first["loc"])
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        section: Any = recipe
        for part in place[:-1]:
            if isinstance(part, str):
                section = _section(section.model_fields[part].annotation)
        return f"unknown key {name!r}{near_miss(str(place[-1]), section.model_fields)}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"


def _section(annotation: Any) -> Any:
    """The section inside an annotation: `Section`, `Section | None` or `list[Section]`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(found for part in get_args(annotation) if (found := _section(part)) is not None) if get_args(
        annotation) else None
