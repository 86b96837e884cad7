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
    """The first problem of a validation error as one sentence; an unknown key explains a missing one.

    A key that may be one of several kinds, as `prune.blocks`, is refused for what each of them asks.
    """
    problems = error.errors()
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = _keys(recipe, first["loc"])
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        section: Any = recipe
        for part in place[:-1]:
            if isinstance(part, str):
                section = _section(section.model_fields[part].annotation)
        return f"unknown key {name!r}{near_miss(str(place[-1]), section.model_fields)}"
    asked = [problem["msg"].removeprefix("Value error, ") for problem in problems
             if _keys(recipe, problem["loc"]) == place]
    return f"{name}: {', or '.join(dict.fromkeys(asked))} (got {first['input']!r})"


def _keys(recipe: type[BaseModel], location: tuple[int | str, ...]) -> list[int | str]:
    """The keys and list indices of pydantic's location, without the names it gives the members of a union."""
    section: Any = recipe
    kept: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif section is not None:
            kept.append(part)
            field = section.model_fields.get(part)
            section = _section(field.annotation) if field else None
    return kept


def _section(annotation: Any) -> Any:
    """The section inside an annotation: `Section`, `Section | None` or `list[Section]`; None where it holds none."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part)) is not None), None)
