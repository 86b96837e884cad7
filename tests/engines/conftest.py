"""Shared by the checks of engines: which checkpoints they are of, and where those are made, once in a run.

`make engines MODEL=FOLDER` takes a real model too, beside the bundled one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_cases import Checkpoints, of_gguf, of_real_model, of_vllm
from llama_cpp import Library

from sinkquant.models import resolve


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the checks are told."""
    parser.addoption("--model", help="a folder with a model, of which some recipes are checked, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every checkpoint, the bundled model's first."""
    real = [str(resolve(one))] if (one := metafunc.config.getoption("--model")) else []
    for fixture, of_bundled in (("vllm_case", of_vllm()), ("gguf_case", of_gguf())):
        if fixture in metafunc.fixturenames:
            cases = [*of_bundled, *(case for folder in real for case in of_real_model(folder, fixture == "gguf_case"))]
            metafunc.parametrize(fixture, cases, ids=str)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes what a check asks for, once."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def library() -> Library:
    """A process loads it once."""
    return Library()


@pytest.fixture(scope="session")
def table() -> Iterator[list[str]]:
    """Lines of the table of docs/results/engines.md, printed and written to out/engines.md at the end."""
    lines: list[str] = []
    yield lines
    text = "\n".join(lines)
    print(f"\n{text}")
    place = Path("out") / "engines.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"{text}\n", encoding="utf-8")
