"""`quantize-model init` writes recipes that load, plan and say what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call

from sinkquant import Recipe


@pytest.mark.parametrize(("size", "bits", "budget_bits", "budget_bytes"), [
    ("3", 3, None, None), ("3.5", 4, 3.5, None), ("80MB", 4, None, 80_000_000), ("1.5 gb", 4, None, 1_500_000_000)])
def test_a_recipe_is_written(tmp_path: Path, tiny_folder: Path, size: str, bits: int, budget_bits: float | None,
                             budget_bytes: int | None) -> None:
    outcome = call("init", str(tmp_path / "mine.yaml"), "--model", str(tiny_folder), "--engine", "vllm-cuda",
                   "--size", size)
    assert outcome.code == 0, outcome.err
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert (recipe.name, recipe.weights.bits) == ("mine", bits)
    assert (recipe.budget.bits, recipe.budget.bytes) == (budget_bits, budget_bytes)
    assert recipe.budget.engine == ("vllm-cuda" if recipe.budget.limited else "any")
    assert "#" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "says"), [
    (["--size", "0MB"], "budget.bytes"), (["--size", "many"], "no size"),
    (["--size", "1.2.3MB"], "no size"), (["--size", "9"], "2 to 8"),
    (["--size", "1.5"], "more than 2"), (["--engine", "onnx"], "no engine 'onnx'"),
    (["--model", "nowhere"], "nowhere")])
def test_wrong_answers_write_nothing(tmp_path: Path, tiny_folder: Path, options: list[str], says: str) -> None:
    given = dict(zip(["--model", "--engine", "--size"], [str(tiny_folder), "transformers", "4"], strict=True))
    given |= {options[0]: options[1]}
    outcome = call("init", str(tmp_path / "mine.yaml"), *[word for pair in given.items() for word in pair])
    assert outcome.code == 2
    assert says in outcome.err
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("name", ["4", "my: own", "null", "\U0001f389 ja"])
def test_any_name_of_a_file_is_a_name_of_a_recipe(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    assert call("init", str(tmp_path / f"{name}.yaml"), "--model", str(tiny_folder), "--engine", "transformers",
                "--size", "4").code == 0
    assert Recipe.load(tmp_path / f"{name}.yaml").name == name


def test_the_commands_that_come_next_are_quoted(tmp_path: Path, tiny_folder: Path) -> None:
    done = call("init", str(tmp_path / "my own.yaml"), "--model", str(tiny_folder), "--engine", "transformers",
                "--size", "4")
    assert f"-r '{tmp_path / 'my own.yaml'}'" in " ".join(done.out.split())


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: kept\n", encoding="utf-8")
    outcome = call("init", str(tmp_path / "mine.yaml"))
    assert outcome.code == 2
    assert "exists already" in outcome.err
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "name: kept\n"
