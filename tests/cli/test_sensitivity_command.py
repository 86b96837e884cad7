"""Sensitivities and sweeps of budgets on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from sinkmaps import sink_map_of
from tiny_tokenizer import random_text
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sinkquant.artifacts import Frontier, Sensitivity
from sinkquant.cli import app, parts
from sinkquant.cli.tables.sensitivity import linear_table, ranking_in_words
from sinkquant.models import Decoder


def test_the_command_writes_a_file_and_shows_it_with_its_ranking(tiny: PreTrainedModel, tiny_folder: Path,
                                                                tmp_path: Path) -> None:
    text, known, out = tmp_path / "words.txt", tmp_path / "sinkmap.json", tmp_path / "sensitivity.json"
    text.write_text(random_text(200))
    sink_map_of(Decoder.of(tiny)).save(known)
    settings = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=2",
                "sensitivity.length=16", "sensitivity.bits=[3,8]", "sensitivity.measure_rows=1",
                "sensitivity.measure_length=8"]
    common = [str(tiny_folder), "--text", str(text), "--sink-map", str(known),
              *(part for one in settings for part in ("--set", one))]
    done = CliRunner().invoke(app, ["sensitivity", *common, "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    found = Sensitivity.load(out)
    assert "Rank correlation of predicted and measured losses over 24 formats" in done.output
    with (console := Console(width=200)).capture() as shown:
        console.print(linear_table(found))
    row = next(line for line in shown.get().splitlines() if "model.layers.1.self_attn.q_proj + k_proj + v_proj" in line)
    first = next(unit for unit in found.units if unit.modules[0] == "model.layers.1.self_attn.q_proj").losses[0].terms
    assert f"{1000 * first.total:.2g}" in row
    assert f"{first.sinks / first.total:.1%}" in row
    assert ranking_in_words(found.model_copy(update={"ranking": None})) == []
    swept = CliRunner().invoke(app, ["plan", *common, "--sensitivity", str(out), "--frontier", "--set", "budget.bits=5",
                                     "--set", "kv_cache=null", "-o", str(tmp_path / "sweep.html")],
                               catch_exceptions=False)
    assert swept.exit_code == 0
    sweep = Frontier.load(tmp_path / "sweep.json")
    assert {point.kind for point in sweep.points} == {"solved", "uniform"}
    assert any("the recipe's plan, its control" in note for note in sweep.notes)  # in bits that nobody tried
    assert (tmp_path / "sweep.html").read_text().count("<tr>") == len(sweep.points) + 1


def test_sinks_that_look_like_markup_are_shown_as_they_are() -> None:
    found = Sensitivity.model_construct(units=[], sinks=["[/INST]", "[gMASK]"])
    with (console := Console(width=200)).capture() as shown:
        console.print(linear_table(found))
    assert "'[/INST]', '[gMASK]'" in " ".join(shown.get().split())


def test_a_file_of_sensitivities_is_read_where_nothing_can_be_written(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "require_writable", lambda _: pytest.fail("asked"))
    (tmp_path / "costs.json").write_text("{}")
    done = CliRunner().invoke(app, ["sensitivity", "nowhere", "-o", str(tmp_path / "costs.json")])
    assert "'nowhere' is not a model folder" in str(done.exception)


@pytest.mark.parametrize("setting", ["kv_cache.bits=5", "activations={format: int8, bits: 10}"])
def test_a_sweep_of_nothing_that_weights_lose_is_refused_before_compute(setting: str, tiny_folder: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_folder), "-r", "w4-kv2-sink", "--frontier", "--set", setting])
    assert "--frontier takes what formats of the weights lose" in str(done.exception)
