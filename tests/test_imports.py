"""What a command imports is what it needs: the help must come at once, and only evaluation loads lm-eval."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sinkquant

HEAVY = {"torch", "transformers", "lm_eval", "datasets", "matplotlib", "scipy", "compressed_tensors", "accelerate",
         "bitsandbytes"}
AFTER_A_COMMAND = """
import sys
from sinkquant.cli import main
try:
    main()
except SystemExit:
    pass
print("modules", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imported(code: str, *arguments: str) -> set[str]:
    """Top-level packages that a process of its own has imported at the end of a program."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "modules"
    return set(last[1:])


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes"], ["recipes", "show", "w4a16-sink"],
                                       ["run", "no-such-recipe"], ["detect"], ["plan", "a", "--no-such-option"],
                                       ["detect", "nowhere"], ["plan", "nowhere"], ["run", "-m", "nowhere"],
                                       ["doctor", "nowhere"], ["diagnose", "nowhere"], ["advise", "nowhere"],
                                       ["eval", "nowhere"], ["compare", "x", "--baseline", "nowhere"],
                                       ["explain", "x", "--baseline", "nowhere"]],
                         ids=" ".join)
def test_help_and_wrong_arguments_import_nothing_heavy(arguments: list[str]) -> None:
    assert not imported(AFTER_A_COMMAND, *arguments) & HEAVY


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
