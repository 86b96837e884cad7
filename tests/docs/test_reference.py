"""The reference in docs/ is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sinkquant.recipe import recipe_names

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_pages_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate", REFERENCE / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    for name in recipe_names():
        assert f"| `{name}` |" in pages["recipes.md"]
    for key in ("weights.bits", "protect.sink_weight", "kv_cache.window", "evaluate.precision"):
        assert f"| `{key}` |" in pages["recipe-keys.md"]
    assert "## `quantize-model run [RECIPE]`" in pages["command-line.md"]
    for name, content in pages.items():
        assert (REFERENCE / name).read_text(encoding="utf-8") == content, (
            f"{name} is out of date; run python docs/reference/generate.py")
