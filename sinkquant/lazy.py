"""Packages whose public names are imported when they are first asked for."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Leave the garbage collector out while the context is open: what imports make stays, and looking through it again
    and again is a fifth of the time that torch and transformers take."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def make_lazy(module: str) -> None:
    """Let a package import a name when somebody first asks for it.

    The names are those that its `if TYPE_CHECKING:` block imports, so that type checkers and readers find them where
    they always do. They are data descriptors of the package's class and not a `__getattr__`, since importing the
    package `sinkquant.detect` would put it in the place of the function of the same name.

    Args:
        module: the `__name__` of the package, which calls this.
    """
    package = sys.modules[module]
    found = {name: _Name(name, home) for name, home in _imported_for_types(inspect.getsource(package))}
    names = sorted({*vars(package), *found})
    package.__class__ = type("LazyPackage", (ModuleType,), found | {"__dir__": lambda _: names})


def _imported_for_types(source: str) -> Iterator[tuple[str, str]]:
    """Name and the module that defines it, for every `from module import name` under `if TYPE_CHECKING:`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for one in node.body:
                assert isinstance(one, ast.ImportFrom)
                assert one.module
                yield from ((alias.name, one.module) for alias in one.names)


class _Name:
    """One public name of a package."""

    def __init__(self, name: str, home: str) -> None:
        self.name, self.home = name, home

    def __get__(self, package: ModuleType, _: type) -> Any:
        known = vars(package)
        if self.name not in known:
            with uncollected():
                known[self.name] = getattr(importlib.import_module(self.home), self.name)
        return known[self.name]

    def __set__(self, package: ModuleType, value: Any) -> None:
        if not isinstance(value, ModuleType):  # a package of this name, which the import system puts here
            vars(package)[self.name] = value

    def __delete__(self, package: ModuleType) -> None:
        vars(package).pop(self.name, None)
