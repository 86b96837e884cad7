"""Commands and Python of every guide run, in the order of its page, on a tiny model in place of the reader's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import call
from documented import ELSEWHERE, GUIDES, PROGRAM, Reader, furnish
from families import tiny_model
from small_runs import SMALL
from tiny_bpe import BPE_VOCABULARY, byte_level

import sinkquant as sq

PAGES = [page for page in GUIDES if page.name != "README.md"]


@pytest.fixture(scope="module")
def reader(small_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """With a tokenizer that GGUF knows for llama.cpp."""
    folder = tmp_path_factory.mktemp("bpe")
    model = tiny_model("llama", vocab_size=BPE_VOCABULARY, num_hidden_layers=2, max_position_embeddings=128)
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)

    def run(arguments: list[str]) -> tuple[int, str]:
        outcome = call(*arguments)
        return outcome.code, outcome.err

    return Reader(str(small_folder), text_file, run, ["weights.group_size=32"],
                  {"llama-cpp.md": str(folder)})


@pytest.fixture(scope="module")
def made(small_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default recipe."""
    folder = tmp_path_factory.mktemp("made") / "run"
    recipe = sq.Recipe.load("w4-kv2-sink").replace([
        f"calibration.text={text_file}", f"evaluate.text={text_file}", *SMALL, "evaluate.skip=true"])
    sq.run(recipe, model=str(small_folder), output=str(folder))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guide_runs_as_it_stands(page: Path, reader: Reader, made: Path, text_file: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(page.name, made, text_file.read_text(encoding="utf-8"))
    reader.read(page)


def test_what_is_not_run_is_known() -> None:
    """A line for a shell is one of ours, or named."""
    for page in GUIDES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                assert PROGRAM.match(line) or line.startswith(ELSEWHERE), (page.name, line)
