"""Write the reference from the code: recipe keys, packaged recipes, and the command line.

    python docs/reference/generate.py [--check]

`--check` writes nothing and ends with exit code 1 where a page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sinkquant.cli.entry import EXIT_CODES, app
from sinkquant.recipe import Recipe, recipe_names

HERE = Path(__file__).parent


def main() -> None:
    """Write the pages, or say which of them are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {name: content for name, content in pages().items() if not _is(HERE / name, content)}
    if not check:
        for name, content in stale.items():
            (HERE / name).write_text(content, encoding="utf-8")
    elif stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/reference/generate.py.")


def pages() -> dict[str, str]:
    """File name -> its content."""
    return {"recipe-keys.md": recipe_keys(), "recipes.md": recipes(), "command-line.md": command_line()}


def recipe_keys() -> str:
    """Every key of a recipe with its default, section after section."""
    parts = ["# Recipe keys", "Made from the code by `docs/reference/generate.py`. `--set KEY=VALUE` sets any of them; "
             "a recipe file holds the same keys as YAML.", *_section(Recipe, "")]
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """The recipes that come with the package."""
    rows = [f"| `{name}` | {Recipe.load(name).description} |" for name in sorted(recipe_names())]
    table = "\n".join(["| name | what it does |", "|---|---|", *rows])
    return "\n\n".join([
        "# Packaged recipes", "Made from the code by `docs/reference/generate.py`. `quantize-model recipes show NAME` "
        "prints one with every default; any key is changed with `--set`.", table]) + "\n"


def command_line() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    parts = ["# Command line", "Made from the code by `docs/reference/generate.py`.", EXIT_CODES]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        usage = " ".join(_argument(part) for part in command.params if part.param_type_name == "argument")
        parts += [f"## `quantize-model {' '.join(f'{name} {usage}'.split())}`", _help(command.help)]
        rows = [f"| {_names(part)} | {_help(part.help)}{_default(part.default)} |" for part in command.params
                if part.name != "help" and getattr(part, "help", None)]
        if rows:
            parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _section(section: type[BaseModel], prefix: str) -> list[str]:
    """A table of a section's keys, and then the sections in it."""
    rows, inner = [], []
    for name, field in section.model_fields.items():
        found = _sections_in(field.annotation)
        if found:
            inner += [f"## `{prefix}{name}`", *(part for one in found for part in _section(one, f"{prefix}{name}."))]
        default = "required" if field.default is PydanticUndefined and field.default_factory is None else (
            f"`{_plain(field.get_default(call_default_factory=True))}`")
        if not found or "None" in str(field.annotation) or get_origin(field.annotation) is list:
            rows.append(f"| `{prefix}{name}` | {_type(field.annotation)} | {default} |")
    words = _help(inspect.getdoc(section))
    table = "\n".join(["| key | values | default |", "|---|---|---|", *rows])
    return [words, *([table] if rows else []), *inner]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in get_args(annotation) for one in _sections_in(part)]


def _type(annotation: Any) -> str:
    """An annotation in a reader's words."""
    if annotation is type(None):
        return "null"
    values = get_args(annotation)
    if str(get_origin(annotation)).endswith("Literal"):
        return ", ".join(f"`{_plain(value)}`" for value in values)
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type(values[0])}"
    if values:
        return " or ".join(dict.fromkeys(_type(value) for value in values))
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation)))


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "..."
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def _argument(part: Any) -> str:
    name = f"{part.name.upper()}{' ...' if part.nargs == -1 else ''}"
    return name if part.required else f"[{name}]"


def _names(part: Any) -> str:
    if part.param_type_name == "argument":
        return f"`{_argument(part)}`"
    return ", ".join(f"`{name}`" for name in part.opts)


def _default(default: Any) -> str:
    return "" if default in (None, False, "", ()) or callable(default) else f" Default: `{default}`."


def _help(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _is(path: Path, content: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == content


if __name__ == "__main__":
    main()
