"""Every command of the documentation is one that the command line takes, with recipe keys that there are.

README's commands are run in tests/test_public_face.py, those of the guides in tests/docs/test_guides.py; those of the
results are of larger models."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
from documented import PROGRAM, lines_of
from typer.main import get_command

from sinkquant.cli import app
from sinkquant.recipe import Recipe, recipe_names

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("evals/results/*.md")])
SCRIPTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("evals/**/*.py")))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


ALL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in lines_of(page)]
OURS = [(page, line) for page, line in ALL if PROGRAM.match(line) and not line.endswith("...")]


@pytest.mark.parametrize(("page", "line"), OURS)
def test_the_command_line_takes_it(page: str, line: str) -> None:
    arguments = shlex.split(PROGRAM.sub("", line))
    group = get_command(app)
    with group.make_context("quantize-model", arguments[:1], resilient_parsing=True) as context:
        name, command, _ = group.resolve_command(context, arguments)  # type: ignore[attr-defined]
        command.make_context(name, arguments[1:], parent=context)
    named = [word for word in arguments if word in recipe_names()]
    keys = [after for word, after in itertools.pairwise(arguments)
            if word == "--set" and after != "KEY=VALUE"]
    (Recipe.load(named[0]) if named else Recipe()).replace(keys)


def test_other_commands_are_there() -> None:
    for page, line in ALL:
        if found := re.match(r"make (\w+)", line):
            assert f"\n{found[1]}:" in MAKEFILE, (page, line)
        if line.startswith("python evals/"):
            assert (ROOT / line.split()[1]).is_file(), (page, line)
            for option in re.findall(r" (--[\w-]+)", line):
                assert f'"{option}"' in SCRIPTS, (page, option)


def test_commands_are_found() -> None:
    assert len(OURS) > 40
    assert {"README.md", "docs/guides/policy.md", "docs/guides/large-models.md"} <= {page for page, _ in OURS}
