"""The commands of the documentation, and a reader who runs them on a small model in the order of a page.

    python tests/documented.py [MODEL]

runs README and the guides page by page in temporary folders, with MODEL (`demo`) in place of the reader's and few rows
of everything, and ends with an error where something fails."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from small_runs import beginning
from typer.main import get_command

import sinkquant as sq
from sinkquant.cli import app
from sinkquant.models import read_text

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
PROGRAM = re.compile(r"^(?:quantize-model|torchrun .*-m sinkquant\.cli) ")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(quantize-model [a-z-]+ [^`]+)`")
ELSEWHERE = ("pip install", "make ", "llama-server", "llama-quantize", "vllm serve", "python -m vllm", "curl",
             "python evals/", "torchrun --nnodes")
"""How lines begin that are not run: an engine, a package index, a benchmark, more than one machine. Of torchrun on one
machine what every process runs is run once."""
SETTINGS = [
    "calibration.rows=4", "calibration.length=64", "detect.rows=8", "detect.long_rows=1", "evaluate.limit=2",
    "evaluate.sample=2", "evaluate.divergence_rows=2", "evaluate.divergence_length=96", "evaluate.bootstrap=100",
    "evaluate.tasks=[sink_perplexity]", "evaluate.fidelity=false", "sensitivity.rows=2", "sensitivity.length=64",
    "weights.descent=0"]
"""Of commands that take a recipe; what a page asks for comes after them."""
REFUSED = {"cut-heads": "no heads can be cut off"}
"""What a small model has not got: a command -> what it says then."""
MODEL_WORDS = ("MODEL", "FOLDER", "FOLDER_OR_HUB_ID", "demo")


def lines_of(page: Path) -> list[str]:
    """The lines of code of a page, continued ones as one, without comments; what is optional is taken."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [code for _, code in FENCE.findall(text)]
    blocks += re.findall(r"^ {4,}[^\n]*", text, flags=re.MULTILINE)
    lines = [re.sub(r"\s+# .*", "", line.strip()) for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(re.sub(r"\[(--?\w[^\]]*)\]", r"\1", line) for line in lines))


def snippets_of(page: Path) -> Iterator[tuple[str, str]]:
    """("command", a line), ("python", a block), in the order of the page; commands inside of a sentence count."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    pattern = re.compile(rf"{FENCE.pattern}|^    ( *quantize-model [^\n]*)|{INLINE.pattern}", FENCE.flags)
    for language, block, indented, inline in pattern.findall(text):
        if language == "python":
            yield "python", block
        for line in [*(block if language != "python" else "").splitlines(), indented, inline]:
            line = re.sub(r"\[(--?\w[^\]]*)\]", r"\1", re.sub(r"\s+# .*", "", line.strip()))
            if PROGRAM.match(line) and not line.startswith(ELSEWHERE):
                yield "command", line


def options_of(command: str) -> set[str]:
    """What options a command of `quantize-model` has."""
    group: Any = get_command(app)
    return {option for parameter in group.commands[command].params for option in parameter.opts}


class Reader:
    """Who types what stands in a page, in a folder of its own.

    Args:
        model: in place of theirs. text: a text that it knows, None for the packaged ones.
        call: runs a command line, and returns its exit code and what it said on the error stream.
        settings: `--set` values of commands that take a recipe, after `SETTINGS`. models: page -> another model.
    """

    def __init__(self, model: str, text: Path | None, call: Callable[[list[str]], tuple[int, str]],
                 settings: list[str], models: dict[str, str] | None = None) -> None:
        self.usual, self.text, self.call, self.models = model, text, call, models or {}
        self.model, self.told = model, list[list[str]]()
        own = [] if text is None else [f"calibration.text={text}", f"evaluate.text={beginning(text)}"]
        self.settings = [*own, *SETTINGS, *settings]

    def arguments(self, line: str) -> list[str]:
        """A line as it is run."""
        command, *rest = shlex.split(PROGRAM.sub("", line))
        words = [self.model if word in MODEL_WORDS else word for word in rest]
        options = options_of(command) if command != "recipes" else set()
        small: list[str] = []
        if "--set" in options and "--plan" not in words:
            small = [part for one in self.settings for part in ("--set", one)]
        elif "--text" in options and self.text is not None:
            small = ["--text", str(beginning(self.text))]
        if command == "run" and not {"--task-folder", "--plan"} & set(words):
            small += ["--set", "evaluate.skip=true"]
        if "--rows" in options:
            small += ["--rows", "2", "--length", "64"]
        if command == "run" and not {"-m", "--model"} & set(words):
            words += ["--model", self.model]
        if command == "run" and not {"-o", "--output"} & set(words):
            words += ["--output", "out"]
        return [command, *small, *words]

    def read(self, page: Path) -> list[str]:
        """Run a page in the current folder.

        Returns:
            the lines that were run.

        Raises:
            AssertionError: naming the line that failed.
        """
        done: list[str] = []
        self.model = self.models.get(page.name, self.usual)
        names: dict[str, Any] = {"sq": sq, "FOLDER": self.model}
        for kind, text in snippets_of(page):
            if kind == "python":
                code = text.replace('"demo"', repr(self.model))
                exec(compile(code, page.name, "exec"), names)  # noqa: S102
            elif (arguments := self.arguments(text)) not in self.told:
                if arguments[0] == "run" and "--resume" not in arguments:
                    place = [after for word, after in itertools.pairwise(arguments) if word in ("-o", "--output")][-1]
                    shutil.rmtree(place, ignore_errors=True)
                result, said = self.call(arguments)
                refused = REFUSED.get(arguments[0], "\n") in said
                assert result == 0 or refused, f"{page.name}: {text}: {said}"
                done.append(text)
                if not {"-o", "--output"} & set(arguments):  # it tells something, and another page may ask again
                    self.told.append(arguments)
        return done


def furnish(page: str, made: Path, text: str) -> None:
    """What a page takes for granted, put into the current folder.

    Args:
        made: a finished run of `w4-kv2-sink` with its sink map. text: for a task of the reader's own.
    """
    Path("sinkmap.json").write_bytes((made / "sinkmap.json").read_bytes())
    for place in {"diagnose.md": ["out/w3"], "evaluation.md": ["out/w4"], "explain-a-collapse.md": ["A", "B", "C"],
                  "policy.md": ["A", "B"], "large-models.md": ["out"]}.get(page, ["out"]):
        Path(place).parent.mkdir(exist_ok=True)
        shutil.copytree(made, place, symlinks=True)
    if page == "evaluation.md":
        Path("my_tasks").mkdir()
        for name in ("piqa", "my_task"):
            data = Path("my_tasks", f"{name}.jsonl").resolve()
            data.write_text("".join(json.dumps({"text": text[place:place + 200]}) + "\n" for place in (0, 200, 400)))
            Path("my_tasks", f"{name}.yaml").write_text(yaml.safe_dump({
                "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
                "doc_to_target": "text", "metric_list": [{"metric": "bits_per_byte"}]}))


def main() -> None:
    """Run all pages, a process for every command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    model = parser.parse_args().model

    def call(arguments: list[str]) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "sinkquant.cli", *arguments], capture_output=True, text=True,
                              check=False)
        return done.returncode, done.stderr

    reader = Reader(model, None, call, [])
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        assert call(reader.arguments(f"quantize-model run w4-kv2-sink --model {model} --output made"))[0] == 0
        for page in GUIDES:
            os.chdir(temporary)
            Path(page.stem).mkdir()
            os.chdir(page.stem)
            furnish(page.name, Path(temporary) / "made", read_text(None, "evaluation"))
            for line in reader.read(page):
                print(f"{page.name}: {line}", flush=True)


if __name__ == "__main__":
    main()
