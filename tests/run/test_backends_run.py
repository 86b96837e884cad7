"""A whole run per backend: report with its control, and the folder evaluated again."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_cases import BACKEND_CASES
from gguf_files import write_gguf
from small_runs import model_folder, small_recipe

from sinkquant import Plan, Recipe, run
from sinkquant.models.gguf import contents
from sinkquant.run.measure import evaluate_folder, recorded_recipe


@pytest.mark.parametrize(("kind", "family"), [("nf4", "llama"), ("llm.int8", "gpt_neox"), ("quanto-4", "gemma2"),
                                              ("gptq-3", "qwen3")])
def test_a_run_has_a_control_row_and_can_be_evaluated_again(kind: str, family: str, tmp_path: Path,
                                                            text_file: Path) -> None:
    folder = model_folder(tmp_path / "model", family)
    report = run(small_recipe(text_file, *BACKEND_CASES[kind], f"evaluate.fidelity={str(kind == 'nf4').lower()}"),
                 folder, tmp_path / "out")
    assert report is not None
    assert [row.name for row in report.rows] == ["unquantized", "sink_aware", "control"]
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.weight_bytes == report.row("sink_aware").weight_bytes
    assert report.row("control").weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)
    assert report.row("sink_aware").tasks["divergence"]["kl"].value > 0
    again = evaluate_folder(tmp_path / "out", recorded_recipe(tmp_path / "out"), str(folder))
    assert again.row("sink_aware").tasks == report.row("sink_aware").tasks


def test_a_run_from_a_gguf_file_counts_its_bytes_and_its_own_file_knows_the_recipe(tmp_path: Path,
                                                                                  text_file: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    recipe = small_recipe(text_file, "backend=gguf", "weights.method=rtn", "kv_cache=null", "evaluate.control=false",
                          "evaluate.fidelity=false")
    report = run(recipe, tmp_path / "tiny.gguf", tmp_path / "out")
    assert report is not None
    assert report.row("unquantized").weight_bytes == contents(tmp_path / "tiny.gguf")[0]
    assert recorded_recipe(tmp_path / "out" / "model" / "model.gguf") == recipe


def test_a_recipe_is_looked_for_without_unpacking_another_maker_s_file(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkquant.models.folder.unpacked", None)
    write_gguf(tmp_path / "tiny.gguf")
    assert recorded_recipe(tmp_path / "tiny.gguf") == recorded_recipe(tmp_path) == Recipe()
