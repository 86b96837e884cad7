"""Pruning, quantization and the KV cache in one recipe: a row for each, beside its control."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import weight_bytes
from small_runs import model_folder, small_recipe

import sinkquant as sq
from sinkquant.artifacts import Plan, Report, SinkMap
from sinkquant.errors import RequestError
from sinkquant.models import load_model, weight_matrix
from sinkquant.recipe import Recipe
from sinkquant.run import measure
from sinkquant.run.shorter import WHOLE_MAP


def test_the_report_tells_the_steps_apart(tmp_path: Path, text_file: Path) -> None:
    source = model_folder(tmp_path / "source", num_hidden_layers=2)
    recipe = small_recipe(text_file, "weights.method=rtn", "prune.method=wanda", "prune.pattern=2:4",
                          "kv_cache.key_bits=2", "kv_cache.exact=first-n", "evaluate.fidelity=false")
    report = sq.run(recipe, source, tmp_path / "out")
    assert report is not None
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["unquantized", "sink_aware", "control", "pruned", "pruned_control", "weights", "cache",
                          "weights_control", "cache_control"]
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert rows["pruned"].weight_bytes == plan.unquantized_bytes
    assert rows["weights"].weight_bytes == rows["control"].weight_bytes == plan.weight_bytes
    loss = {name: row.tasks["divergence"]["kl"].value for name, row in rows.items() if name != "unquantized"}
    assert 0 < loss["pruned"] < loss["weights"]
    assert not rows["unquantized"].kl_by_position
    for name in loss:  # every row's own bins add up to its own divergence
        sizes = [one.last - one.first + 1 for one in rows[name].kl_by_position]
        total = sum(size * one.kl for size, one in zip(sizes, rows[name].kl_by_position, strict=True))
        assert total / sum(sizes) == pytest.approx(loss[name], rel=1e-5)
    assert ("pruned_control", "pruned") in {(pair.a, pair.b) for pair in report.paired}
    assert any(line.startswith("For the pruning alone it") for line in report.verdict.details)
    model, _ = sq.load(tmp_path / "out" / "model")
    weight = weight_matrix(model.get_submodule("model.layers.1.mlp.down_proj"))
    assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


def test_pruning_alone_is_a_run_of_its_own(tmp_path: Path, text_file: Path) -> None:
    source = model_folder(tmp_path / "source", num_hidden_layers=2)
    recipe = small_recipe(text_file, "weights.ignore=['*']", "prune.method=magnitude", "prune.sparsity=0.3",
                          "evaluate.skip=true")
    sq.run(recipe, source, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert weight_bytes(tmp_path / "out" / "model") == plan.weight_bytes == plan.unquantized_bytes
    weight = load_model(tmp_path / "out" / "model").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert (weight == 0).float().mean() == pytest.approx(0.3, abs=1e-3)


def test_a_pattern_may_be_written_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("prune:\n  method: wanda\n  pattern: 2:4\n")
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert recipe.prune.pattern == "2:4"
    assert Recipe.load("w4-24-sink").prune.pattern == "2:4"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    with pytest.raises(RequestError, match="'n:m' with 0 < n < m"):
        Recipe().replace(["prune.pattern=4:2"])


def test_blocks_are_dropped_before_the_rest(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's checkpoint is a shorter model, quantized; its report compares it with the whole one, tells what the
    blocks alone cost, and the plan that was made is carried out again to the same bytes."""
    source = model_folder(tmp_path / "source", num_hidden_layers=4)
    recipe = small_recipe(text_file, "prune.blocks=0.25", "kv_cache.key_bits=4", "weights.distill=2",
                          "detect.length=32", "evaluate.control=false")
    report = sq.run(recipe, source, tmp_path / "out")
    assert report is not None
    out = tmp_path / "out"
    plan = Plan.load(out / "plan.json")
    assert plan.blocks is not None
    (gone,) = plan.blocks.dropped
    assert plan.blocks.kept == sorted({0, 1, 2, 3} - {gone.block})
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["unquantized", "sink_aware", "pruned", "weights", "cache"]
    assert weight_bytes(out / "model") == plan.weight_bytes == rows["sink_aware"].weight_bytes
    assert rows["pruned"].weight_bytes == plan.unquantized_bytes == weight_bytes(out / "model-shorter")
    assert rows["pruned"].weight_bytes < rows["unquantized"].weight_bytes == plan.blocks.whole_bytes
    loss = {name: row.tasks["divergence"]["kl"].value for name, row in rows.items() if name != "unquantized"}
    assert 0 < loss["pruned"] < 2 * loss["sink_aware"]
    assert any("1 of 4 blocks are dropped" in note for note in report.notes)
    assert report.fidelity is not None
    assert len(report.fidelity.comparisons["sink_aware"].mass) == 3
    loaded = load_model(out / "model")
    assert len(loaded.model.layers) == loaded.config.num_hidden_layers == 3
    sq.run(Recipe.parse(plan.recipe).replace(["evaluate.skip=true"]), source, tmp_path / "again", edited=plan)
    assert weight_bytes(tmp_path / "again" / "model") == plan.weight_bytes
    for name, tensor in load_model(tmp_path / "again" / "model").state_dict().items():
        assert (tensor == loaded.state_dict()[name]).all(), name
    _its_gate_is_of_the_whole_model(out, source, monkeypatch)


def _its_gate_is_of_the_whole_model(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sink rates stand beside those of the model with all its blocks: from the run's folder, or found now."""
    whole = SinkMap.load(out / WHOLE_MAP)
    whole.model_copy(update={"sink_rate": dict.fromkeys(whole.sink_rate, 0.125)}).save(out / WHOLE_MAP)
    looked: list[Path] = []
    monkeypatch.setattr(measure, "sinks_after", lambda path, *_: looked.append(path) or whole)
    monkeypatch.setattr(measure, "evaluate", lambda *_, **given: Report.load(out / "report.json").model_copy(
        update={"fidelity": given["fidelity"]}))
    recipe = Recipe().replace(["gate.max_sink_rate_change=0.5"])
    found = measure.evaluate_folder(out, recipe, str(source)).fidelity
    assert found is not None
    assert found.sink_rate["unquantized"]["0.3"] == 0.125
    assert looked == [out / "model"]
    assert measure.evaluate_folder(out / "model", recipe, str(source)).fidelity is not None
    assert looked == [out / "model", source, out / "model"]
    assert measure.evaluate_folder(out / "model", recipe).fidelity is None
