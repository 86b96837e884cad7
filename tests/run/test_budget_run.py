"""A solved budget from the command to the report: what was predicted of both plans stands beside what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call
from sinkmaps import sink_map_of
from small_runs import SMALL
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan, Report, Sensitivity
from sinkquant.models import Decoder

BUDGET = ["weights.method=rtn", "weights.scale_search=false", "budget.bits=4.5", "budget.solver=sensitivity",
          "sensitivity.rows=8", "sensitivity.length=32"]


def test_predicted_and_measured_loss_of_every_plan_stand_in_the_report(
        tiny: PreTrainedModel, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    known = sink_map_of(Decoder.of(tiny), name=str(tiny_folder)).save(tmp_path / "sinkmap.json")
    settings = [part for one in (*SMALL, *BUDGET, f"calibration.text={text_file}", f"evaluate.text={text_file}",
                                 "evaluate.fidelity=false") for part in ("--set", one)]
    output = tmp_path / "out"
    done = call("run", "w3.5-budget", "-m", tiny_folder, "-o", output, "--sink-map", known, *settings)
    assert done.code == 0, done.err
    report = Report.load(output / "report.json")
    plans = {"sink_aware": Plan.load(output / "plan.json"), "control": Plan.load(output / "plan-control.json")}
    assert plans["sink_aware"].bits_per_weight <= 4.5
    assert len({decision.bits for decision in plans["sink_aware"].modules.values()}) > 1
    costs = Sensitivity.load(output / "sensitivity.json")
    assert costs.rows == 8
    for name, plan in plans.items():
        loss, size = (next(one for one in report.forecasts if (one.row, one.quantity) == (name, quantity))
                      for quantity in ("kl", "weight_bytes"))
        assert loss.predicted == plan.predicted["kl"]
        assert loss.predicted > 0
        assert loss.measured == next(row for row in report.rows if row.name == name).tasks["divergence"]["kl"].value
        assert 0.2 < loss.predicted / loss.measured < 5
        assert size.predicted == pytest.approx(size.measured, rel=0.01)
        assert size.predicted == plan.weight_bytes
    assert plans["sink_aware"].predicted["kl"] <= plans["control"].predicted["kl"]
    stages = {one.quantity for one in report.forecasts if one.row == "run"}
    assert "seconds to quantize control" in stages
    assert "seconds to detect" not in stages  # the sink map was given
    assert "predicted" in (output / "report.md").read_text(encoding="utf-8")
    shown = call("diff", output, output / "plan-control.json", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found["a"]["kl"] == plans["sink_aware"].predicted["kl"]
    assert found["b"]["kl"] == plans["control"].predicted["kl"]
