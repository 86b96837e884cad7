"""Where the data that ships with sinkquant lies: recipes, evaluation tasks, the demo model and its texts."""

from __future__ import annotations

from pathlib import Path

from sinkquant.errors import SinkquantError

PACKAGE = Path(__file__).resolve().parent


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    """A wheel carries the folder inside the package; an editable install finds it in the checkout."""
    for folder in (PACKAGE / in_wheel, PACKAGE.parent / in_checkout):
        if folder.is_dir():
            return folder
    raise SinkquantError(f"the installation lacks its folder {in_wheel}; install sinkquant again.")


def recipe_folder() -> Path:
    """The named recipes, `*.yaml`."""
    return _shipped("recipes", "recipes")


def task_folder() -> Path:
    """The packaged lm-eval tasks, YAML and jsonl."""
    return _shipped("tasks", "evals/tasks")


def demo_model() -> Path:
    """The bundled model, a folder that transformers loads."""
    return _shipped("demo/model", "sinkquant/demo/model")


def demo_text(split: str) -> Path:
    """The packaged text of a split: "calibration" or "evaluation"."""
    return PACKAGE / "demo" / f"{split}.txt"
