"""`import sinkquant` lets transformers load sinkquant's own format, without importing transformers for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

OWN_FORMAT = "sinkquant.formats.own"
REGISTRY = "transformers.quantizers"


def register_own_format() -> None:
    """Register it now where transformers' quantizers are imported already, and else as soon as they are."""
    if REGISTRY in sys.modules:
        importlib.import_module(OWN_FORMAT)
    else:
        sys.meta_path.insert(0, _AfterRegistry())


class _AfterRegistry:
    """A finder that imports the own format after transformers' registry, once."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(OWN_FORMAT)

            vars(spec.loader)["exec_module"] = execute_and_register  # this loader is of this module alone
        return spec
