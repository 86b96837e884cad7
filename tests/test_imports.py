"""What a command imports is what it needs: the help must come at once, and only evaluation loads lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sinkquant

HEAVY = {"torch", "transformers", "lm_eval", "datasets", "matplotlib", "scipy", "compressed_tensors", "accelerate",
         "bitsandbytes"}
COMMANDS = [["--help"], ["run", "--help"], ["recipes"], ["recipes", "show", "w4a16-sink"], ["run", "no-such-recipe"],
            ["detect"], ["plan", "a", "--no-such-option"], ["detect", "nowhere"], ["plan", "nowhere"],
            ["run", "-m", "nowhere"], ["doctor", "nowhere"], ["diagnose", "nowhere"], ["advise", "nowhere"],
            ["eval", "nowhere"], ["compare", "x", "--baseline", "nowhere"], ["explain", "x", "--baseline", "nowhere"]]
AFTER_EVERY_COMMAND = """
import json, sys
from sinkquant.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["quantize-model", *arguments]
    try:
        main()
    except SystemExit:
        pass
    print("modules", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def said(code: str, *arguments: str) -> list[set[str]]:
    """Top-level packages that a process of its own has imported, every time that the program says so."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("modules ")]


def imported(code: str) -> set[str]:
    """Top-level packages that a process of its own has imported at the end of a program."""
    (found,) = said(code)
    return found


@pytest.fixture(scope="module")
def after_commands() -> list[set[str]]:
    """What one process has imported after the first command, after the second, and so on."""
    return said(AFTER_EVERY_COMMAND, json.dumps(COMMANDS))


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[" ".join(command) for command in COMMANDS])
def test_help_and_wrong_arguments_import_nothing_heavy(index: int, after_commands: list[set[str]]) -> None:
    assert len(after_commands) == len(COMMANDS)
    assert not (after_commands[index] - (after_commands[index - 1] if index else set())) & HEAVY


def modules_after(*names: str) -> set[str]:
    """Top-level packages that are there once modules are imported."""
    code = "".join(f"import {name}\n" for name in names)
    return imported(f"import sys\n{code}print('modules', *sorted({{n.partition('.')[0] for n in sys.modules}}))")


def test_artifacts_recipes_and_policy_import_no_torch() -> None:
    assert not modules_after("sinkquant", "sinkquant.artifacts", "sinkquant.recipe", "sinkquant.policy") & HEAVY


def test_what_only_evaluation_needs_is_imported_by_it() -> None:
    """What detection and quantization run with counts as their memory."""
    found = modules_after("sinkquant.detect", "sinkquant.formats.stream", "sinkquant.run.pipeline")
    assert "transformers" in found
    assert not found & {"lm_eval", "datasets", "matplotlib", "bitsandbytes"}


def test_a_public_name_is_no_package_of_that_name() -> None:
    """Importing `sinkquant.detect` must leave the function `sinkquant.detect` where it was."""
    code = ("import sys, sinkquant\nimport sinkquant.detect.survey, sinkquant.run.folder, sinkquant.evaluate\n"
            "names = [n for n in sinkquant.__all__ if callable(getattr(sinkquant, n)) and n in dir(sinkquant)]\n"
            "print('modules', *names)")
    assert imported(code) == set(sinkquant.__all__)


@pytest.mark.parametrize("order", ["import sinkquant, transformers.quantizers",
                                   "import transformers.quantizers, sinkquant"])
def test_transformers_knows_the_own_format_after_importing_sinkquant(order: str) -> None:
    code = (f"{order}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
            "print('modules', *AUTO_QUANTIZER_MAPPING)")
    assert "sinkquant" in imported(code)


def test_importing_sinkquant_imports_no_transformers() -> None:
    assert not modules_after("sinkquant") & HEAVY
