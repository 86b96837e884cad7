"""What the sections of a recipe have in common, and how `--set` names a value in one."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sinkquant.errors import RequestError


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _stored_bits(bits: int) -> int:
    if bits > 8 and bits != 16:
        raise ValueError("weights take 2 to 8 bits, or 16 to be left alone")
    return bits


def _fits_a_group(size: int) -> int:
    if size == 0:
        raise ValueError("a group holds at least one column; -1 makes one group of the whole row")
    return size


Bits = Annotated[int, AfterValidator(_stored_bits)]
GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_fits_a_group)]
Statistics = Literal["all", "boost", "attention", "cap", "exclude"]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""What `--set` takes as it stands, not as YAML; `~` is the home folder."""


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
        return path, read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"--set {key}: the value {value!r} is not YAML.") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML drops the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As PyYAML's."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:place]):
                raise yaml.composer.ComposerError(f"the key {key.value!r} stands twice, in line "
                                                  f"{key.start_mark.line + 1} again")
        return node


def read_yaml(text: str) -> Any:
    """What YAML says; plain data alone.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none, or a key stands twice.
    """
    return yaml.load(text, _Loader)


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
