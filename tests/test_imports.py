"""What `import sinkquant` brings along: what detection and quantization run with counts as their memory."""

from __future__ import annotations

import ast
from pathlib import Path

import sinkquant

PACKAGE = Path(sinkquant.__file__).parent
ONLY_FOR_EVALUATION = {"lm_eval", "datasets", "matplotlib"}


def imported(module: str) -> set[str]:
    """Names of all modules that the top level of a module of the package imports."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {name for alias in node.names if _is_module(name := f"{node.module}.{alias.name}")}
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("sinkquant") and (path.is_dir() or path.with_suffix(".py").is_file())


def test_what_only_evaluation_needs_is_imported_by_it() -> None:
    waiting, seen = ["sinkquant"], set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module.startswith("sinkquant"):
            waiting += imported(module)
            waiting += [module.rpartition(".")[0]] if "." in module else []
    assert "sinkquant.evaluate.evaluate" in seen
    assert not {module.split(".")[0] for module in seen} & ONLY_FOR_EVALUATION
    assert not any("bitsandbytes" in module for module in seen if not module.startswith("sinkquant"))
