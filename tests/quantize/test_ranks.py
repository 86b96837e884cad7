"""Two processes give what one gives, to numerical noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_mixture
from safetensors.torch import load_file
from sinkmaps import BOS, STOP, sink_map_of
from small_runs import model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load_dense
from sinkquant.models import Decoder
from sinkquant.quantize import ranks

TASK = """
import sys
import sinkquant as sq
recipe, model, out, *sinks = sys.argv[1:]
sq.run(recipe, model, out, sink_map=sq.SinkMap.load(sinks[0]) if sinks else None)
"""


def run_twice(folder: Path, recipe: sq.Recipe, model: Path, sink_map: sq.SinkMap | None = None) -> sq.Report | None:
    """One process writes `folder / "one"`, two write `folder / "two"`. Returns the first one's report."""
    known = [sink_map.save(folder / "sinks.json")] if sink_map else []
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "task.py").write_text(TASK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               folder / "task.py", folder / "recipe.yaml", model, folder / "two", *known]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path),
                                                          "OMP_NUM_THREADS": "1"})
    return sq.run(recipe, model, folder / "one", sink_map=sink_map)


def test_two_processes_evaluate_as_one_does(tmp_path: Path, text_file: Path) -> None:
    recipe = small_recipe(text_file, "weights.method=rtn", "weights.scale_search=false", "evaluate.divergence_rows=5",
                          "evaluate.limit=3", "evaluate.tasks=[sink_perplexity, sink_cloze]")
    alone = run_twice(tmp_path, recipe, model_folder(tmp_path / "model"))
    assert alone is not None
    together = sq.Report.load(tmp_path / "two" / "report.json")
    assert [row.name for row in together.rows] == ["unquantized", "sink_aware", "control"]
    for one, two in zip(alone.rows, together.rows, strict=True):
        for task, measures in one.tasks.items():
            for metric, measure in measures.items():
                assert two.tasks[task][metric].value == pytest.approx(measure.value, rel=1e-4, abs=1e-7), (task, metric)
    assert together.evaluation == alone.evaluation
    assert together.verdict.answer == alone.verdict.answer
    assert together.fidelity == alone.fidelity


def test_two_processes_give_what_one_gives(tmp_path: Path, text_file: Path) -> None:
    model = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.descent=0", "calibration.rows=5",
                          "activations.format=int8", "activations.scale=tensor", "activations.sinks=all")
    run_twice(tmp_path, recipe, model)
    one, two = (load_dense(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    scales = [{name: float(tensor) for name, tensor in load_file(tmp_path / place / "model/model.safetensors").items()
               if name.endswith("layers.0.self_attn.q_proj.input_scale")} for place in ("one", "two")]
    assert len(scales[0]) == 1
    assert scales[0] == scales[1]  # the range is that of all rows
    unquantized = sq.load(model)[0]
    first_block = {name: weight for name, weight in one.items() if name.startswith("model.layers.0.")}
    for name, weight in first_block.items():
        # Sums differ by rounding, so that a code on the edge may fall to the other side, and what follows in its row.
        differs = ((weight - two[name]).abs() > 1e-6 * weight.abs().max()).float().mean()
        assert differs < 0.08, name
        error = weight - unquantized.state_dict()[name]
        assert (weight - two[name]).norm() <= 0.4 * error.norm(), name
    # Every such code changes what later blocks get, and with it more codes; what the model loses stays the same.
    rows = torch.arange(8, 72)[None]
    outputs = [load_dense(tmp_path / name / "model")(rows).logits.detach() for name in ("one", "two")]
    lost = [float((logits - unquantized(rows).logits.detach()).norm()) for logits in outputs]
    assert lost[0] == pytest.approx(lost[1], rel=0.2)
    assert (outputs[0] - outputs[1]).norm() < 0.6 * lost[0]


def test_two_processes_share_the_experts_of_a_mixture_and_cap_the_same_sinks(tmp_path: Path, text_file: Path) -> None:
    model = tmp_path / "model"
    tiny_mixture("mixtral", dtype=torch.bfloat16).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.descent=0", "calibration.rows=5",
                          "calibration.batch_size=2", "protect.statistics=cap", "calibration.min_expert_tokens=35")
    run_twice(tmp_path, recipe, model, sink_map_of(Decoder.of(sq.load(model)[0]), tokens=(BOS, STOP), name=str(model)))
    assert len(Plan.load(tmp_path / "two" / "plan.json").calibration.sinks) == 2
    tokens = [json.loads((tmp_path / name / "model/sinkquant.json").read_text())["expert_tokens"]
              for name in ("one", "two")]
    first, second = (f"model.layers.{i}.mlp.experts" for i in range(2))
    assert tokens[0][first] == tokens[1][first]
    assert sum(tokens[0][first]) == 2 * 5 * 64
    assert min(tokens[0][first]) < 35 < max(tokens[0][first])
    # A code on the edge that fell to the other side may send a token to another expert of the next layer.
    assert sum(abs(a - b) for a, b in zip(tokens[0][second], tokens[1][second], strict=True)) <= 4
    one, two = (load_dense(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        differs = ((weight - two[name]).abs() > 1e-6 * weight.abs().max()).float().mean()
        assert differs < 0.02, name


def test_rows_are_shared_out_and_what_cannot_be_shared_is_refused(
        tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = sq.load(model_folder(tmp_path / "model"))
    recipe = small_recipe(text_file, "detect.super_weights=false")
    sink_map = sq.detect(model, tokenizer, recipe=recipe)
    plan = sq.plan(model, sink_map, recipe)
    rows = torch.arange(15).reshape(5, 3)
    assert ranks.my_rows(rows, plan) is rows
    shares = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: (rank, 2))
        shares.append(ranks.my_rows(rows, plan))
    assert torch.equal(torch.cat(shares), rows)
    capped = sq.plan(model, sink_map, recipe.replace(["protect.statistics=cap", "calibration.batch_size=2"]))
    together = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: (rank, 2))
        together.append(ranks.my_rows(rows, capped))
    assert [len(part) for part in together] == [2, 3]  # one batch of two, and one of two with the last one
    assert torch.equal(torch.cat(together), rows)
    with pytest.raises(RequestError, match="1 batches of calibration rows for 2 processes"):
        ranks.my_rows(rows[:2], capped)
    with pytest.raises(RequestError, match="1 calibration rows for 2 processes"):
        ranks.my_rows(rows[:1], plan)
    with pytest.raises(RequestError, match="need all rows in one process"):
        ranks.my_rows(rows, sq.plan(model, sink_map, recipe.replace(["weights.tune=2"])))
