"""`--set key.path=value` -> the path of a key and its value: YAML, but for one file, which is taken as it stands."""

from __future__ import annotations

from typing import Any, get_args

import yaml
from pydantic import BaseModel

from sinkquant.errors import RequestError
from sinkquant.recipe.section import FilePath


def read_assignment(assignment: str, recipe: type[BaseModel]) -> tuple[list[str], Any]:
    """The keys that lead to a value, and the value. `recipe`: the model that says which keys take a path.

    Raises:
        RequestError: there is no "=", or the value is not YAML.
    """
    key, equals, value = assignment.partition("=")
    if not equals:
        raise RequestError(f"--set {assignment!r} has no '='; write --set weights.bits=3.")
    path = key.strip().split(".")
    kinds = _kinds(recipe, path)
    several = list[FilePath] in kinds and value.strip().startswith("[") and value.strip().endswith("]")
    if FilePath in kinds and not several:
        return path, _file(value)
    try:
        return path, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"--set {key}: the value {value!r} is not YAML.") from error


def _file(value: str) -> str | None:
    """A path as it stands, whatever YAML would make of it; quotes around it are YAML's, and null takes it away."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return None if value in ("", "null", "~") else value


def _kinds(model: type[BaseModel], path: list[str]) -> tuple[Any, ...]:
    """What the key may hold: the members of its annotation; empty where there is no such key."""
    field = model.model_fields.get(path[0])
    kinds = (get_args(field.annotation) or (field.annotation,)) if field else ()
    if len(path) == 1:
        return kinds
    return next((_kinds(kind, path[1:]) for kind in kinds
                 if isinstance(kind, type) and issubclass(kind, BaseModel)), ())
