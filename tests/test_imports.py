"""What a command imports is what it needs: the help must come at once, and only evaluation loads lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import script, start
from sinkmaps import sink_map_of
from transformers import PreTrainedModel

import sinkquant
from sinkquant.models import Decoder

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


def forked(work: Path, code: str, *argv: str) -> set[str]:
    """What a program says in a process that has imported transformers, and nothing of sinkquant."""
    (work / "program.py").write_text(code, encoding="utf-8")
    code_of_exit, out, err = start(work / "said", script, str(work / "program.py"), argv=argv).communicate()
    assert code_of_exit == 0, err
    return set(out.splitlines()[-1].split())


def test_what_only_evaluation_needs_is_imported_by_it(tmp_path: Path) -> None:
    """What detection and quantization run with counts as their memory."""
    found = forked(tmp_path, "import sys, sinkquant.detect, sinkquant.formats.stream, sinkquant.run.pipeline\n"
                             "print(*{name.partition('.')[0] for name in sys.modules})")
    assert {"transformers", "sinkquant"} <= found
    assert not found & {"lm_eval", "datasets", "matplotlib", "bitsandbytes"}


@pytest.mark.parametrize(("command", "others"), [
    ("plan", {"evaluate", "detect", "diagnose", "report", "cache", "quantize"}),
    ("doctor", {"evaluate", "diagnose", "report", "formats.stream", "run"})])
def test_what_looks_at_a_folder_imports_nothing_that_computes_more(
        command: str, others: set[str], tiny: PreTrainedModel, tiny_folder: Path, text_file: Path,
        tmp_path: Path) -> None:
    sink_map_of(Decoder.of(tiny)).save(tmp_path / "map.json")
    more = ["--sink-map", str(tmp_path / "map.json"), "--set", "weights.group_size=32"]
    found = forked(tmp_path, "import sys\nfrom sinkquant.cli import main\ntry:\n    main()\n"
                             "except SystemExit as stop:\n    assert not stop.code\nprint(*sys.modules)",
                   "quantize-model", command, str(tiny_folder), *(more if command == "plan" else [
                       "--text", str(text_file)]))
    assert "sinkquant.models.source" in found
    assert not found & {f"sinkquant.{room}" for room in others}
    assert not {name.partition(".")[0] for name in found} & {"lm_eval", "datasets", "matplotlib", "bitsandbytes",
                                                             "peft", "sklearn", "pandas"}


def test_a_public_name_is_no_package_of_that_name(tmp_path: Path) -> None:
    """Importing `sinkquant.detect` must leave the function `sinkquant.detect` where it was."""
    code = ("import sys, sinkquant\nimport sinkquant.detect.survey, sinkquant.run.folder, sinkquant.evaluate\n"
            "names = [n for n in sinkquant.__all__ if callable(getattr(sinkquant, n)) and n in dir(sinkquant)]\n"
            "print(*names)")
    assert forked(tmp_path, code) == set(sinkquant.__all__)


def test_transformers_knows_the_own_format_after_importing_sinkquant(tmp_path: Path) -> None:
    """Whichever of the two is imported first."""
    code = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nprint('modules', *AUTO_QUANTIZER_MAPPING)"
    assert "sinkquant" in imported(f"import sinkquant, transformers.quantizers\n{code}")
    before = "import sys\nassert 'sinkquant' not in sys.modules and 'transformers.quantizers' in sys.modules\n"
    assert "sinkquant" in forked(tmp_path, f"{before}import sinkquant\n{code}")


def test_importing_sinkquant_imports_no_transformers() -> None:
    assert not modules_after("sinkquant") & HEAVY
