"""What README and wheel promise: every snippet runs, every recipe is named, everything that is needed comes along."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import call, settings
from small_runs import SMALL, beginning

import sinkquant as sq
from sinkquant.recipe import recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_tour_of_the_command_line(tmp_path, small_folder, text_file, monkeypatch):
    """As it stands, with a tiny model for the demo and few rows of a text that it knows."""
    monkeypatch.chdir(tmp_path)
    (block,) = snippets("sh")
    lines = block.strip().splitlines()
    assert len(lines) == 7
    for line in lines:
        program, command, *rest = shlex.split(line)
        assert program == "quantize-model"
        arguments = [str(small_folder) if word == "demo" else word for word in rest]
        if command in ("detect", "plan", "run") and "--plan" not in arguments:
            arguments += settings(text_file)
        if command == "doctor":
            arguments += ["--text", str(text_file)]
        outcome = call(command, *arguments)
        assert outcome.code == 0, (line, outcome.err)
    assert {path.name for path in tmp_path.iterdir()} == {"sinkmap.json", "plan.json", "out", "comparison.html"}
    listed = set(re.findall(r"`([\w.-]+(?:/|\.\w+))`", README[README.index("A run's folder"):].split("\n\n")[0]))
    assert listed == {"model/", "model-control/", "sinkmap.json", "plan.json", "report.html", "report.md",
                      "report.json", "run.log"}
    assert {name.rstrip("/") for name in listed} <= {path.name for path in (tmp_path / "out" / "w3").iterdir()}


def test_the_tour_of_the_api(tmp_path, small_folder, text_file, monkeypatch, capsys):
    """As it stands, with a tiny model for the demo and recipes cut down to it."""
    monkeypatch.chdir(tmp_path)

    def small(name: str) -> sq.Recipe:
        return sq.Recipe.load(name).replace([
            f"calibration.text={text_file}", f"evaluate.text={beginning(text_file)}", *SMALL])

    code = "\n".join(snippets("python"))
    for old, new in [('"demo"', repr(str(small_folder))), ("sq.Recipe.load(", "small("),
                     ('sq.run("w4a16-sink"', 'sq.run(small("w4a16-sink")'),
                     ("detect(model, tokenizer)", 'detect(model, tokenizer, recipe=small("w4a16-sink"))')]:
        assert old in code
        code = code.replace(old, new)
    names: dict[str, object] = {"small": small}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert isinstance(names["report"], sq.Report)
    assert names["report"].verdict.sentence in printed
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_every_recipe_and_family_is_named():
    for name in recipe_names():
        assert f"| `{name}` |" in RECIPES
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-NeoX", "OPT", "Mixtral",
                   "Qwen3-MoE", "gpt-oss", "GPT-2"):
        assert family in README


def test_what_the_readme_points_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    for command in ("demo", "test"):
        assert f"\n{command}: " in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_public_names_are_there():
    for name in sq.__all__:
        assert getattr(sq, name).__doc__
    assert sorted(sq.__all__) == sq.__all__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel, built here without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
                   capture_output=True, check=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def test_the_wheel_carries_all_that_a_run_needs(wheel):
    for source, place in (("recipes", "sinkquant/recipes"), ("evals/tasks", "sinkquant/tasks"),
                          ("sinkquant/demo", "sinkquant/demo"),
                          ("sinkquant/report/templates", "sinkquant/report/templates")):
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert f"{place}/{path.relative_to(ROOT / source).as_posix()}" in wheel
    modules = {f"sinkquant/{path.relative_to(ROOT / 'sinkquant').as_posix()}"
               for path in (ROOT / "sinkquant").rglob("*.py")}
    assert modules <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if name.startswith(("tests/", "evals/"))]
