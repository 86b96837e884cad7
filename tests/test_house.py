"""The house has floors, and every room imports from floors below its own only; docs/develop/house.md shows them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sinkquant

PACKAGE = Path(sinkquant.__file__).parent
PAGE = PACKAGE.parent / "docs" / "develop" / "house.md"
CODECS = "schemes.codecs"
"""Stands above `models`, while the rest of `schemes` stands below."""


def room_of(module: str) -> str:
    """The room of "sinkquant.x.y"; empty for the package itself."""
    name = module.removeprefix("sinkquant").removeprefix(".")
    return CODECS if name == CODECS or name.startswith(f"{CODECS}.") else name.partition(".")[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that importing a module imports: not for types, and not inside functions."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sinkquant."):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sinkquant."))


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports from) of the whole package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).with_suffix("")
        room = room_of(f"sinkquant.{'.'.join(inside.parts)}")
        if room == "__init__":
            continue
        found |= {(room, other) for other in map(room_of, imported(ast.parse(path.read_text(encoding="utf-8"))))}
    return {(room, other) for room, other in found if room != other}


def floors() -> dict[str, int]:
    """Room -> its floor, 0 at the bottom, as the page's picture has them from the top."""
    drawn = re.findall(r'^ +\w+\["([^"]+)"\]$', PAGE.read_text(encoding="utf-8"), re.M)
    return {room: level for level, floor in enumerate(reversed(drawn)) for room in floor.split(" · ")}


def test_every_room_is_on_the_picture() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert set(floors()) == (rooms - {"demo"}) | {CODECS}


def test_imports_point_downwards_only() -> None:
    level = floors()
    assert not {f"{room} -> {other}" for room, other in arrows() if level[room] <= level[other]}
