"""The whole diagnosis, on several families, and its artifact."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from families import tiny_model
from planter import Plant, plant
from rich.console import Console
from sinkmaps import sink_map_of
from small_runs import beginning
from tiny_tokenizer import tiny_tokenizer

from sinkquant.artifacts import Diagnosis
from sinkquant.cli.tables.diagnosis import scale_table, tables
from sinkquant.diagnose import diagnose
from sinkquant.diagnose.diagnose import _cache_defences, _Inputs
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk
from sinkquant.recipe import Recipe

RECIPE = Recipe().replace(["detect.rows=16", "detect.long_rows=0"])


@pytest.fixture(scope="module")
def planted(text_file: Path) -> Diagnosis:
    model = plant(tiny_model("llama", max_position_embeddings=128), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    return diagnose(model, tiny_tokenizer(), str(text_file), RECIPE, "planted")


def test_the_planted_sink_is_in_every_part(planted: Diagnosis, tmp_path: Path) -> None:
    assert [(sink.token_id, sink.kind) for sink in planted.sinks] == [(1, "bos")]
    assert [(rates.input, rates.length) for rates in planted.sink_rates] == [
        ("natural", 64), ("natural", 128), ("random", 64), ("repeated", 64)]
    assert planted.sink_rates[0].rates["0.3"].value == pytest.approx(2 / 3)
    assert planted.sink_rates[-1].rates["0.3"].value == 0
    assert [min(layer) > 0.3 for layer in planted.first_position] == [False, True, True]
    assert len(planted.mixing) == 3
    # Two of three blocks give nearly all attention to the sink, and the product is over three.
    assert planted.over_squashing.sink_share.value > 0.9
    assert {spread.with_bos for spread in planted.spread} == {True, False}
    assert {(head.layer, head.head) for head in planted.dormant_heads} == {(b, h) for b in (1, 2) for h in range(4)}
    assert Diagnosis.load(planted.save(tmp_path / "diagnosis.json")) == planted


def test_a_quantized_version_is_diagnosed_beside_it(planted: Diagnosis, text_file: Path) -> None:
    model = plant(tiny_model("llama", max_position_embeddings=128), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.down_proj.weight.data[20] = 0
    found = diagnose(model, tiny_tokenizer(), str(text_file), RECIPE, "planted", attacks=False, against=broken,
                     against_name="broken")
    assert found.fidelity.verdict == "destroyed"
    assert found.against.model.name == "broken"
    assert found.against.massive_ratio < 50 < found.massive_ratio
    assert found.against.dormant_heads == []
    assert found.mixing == planted.mixing
    assert found.robustness == []
    assert Diagnosis.parse(json.loads(found.to_json()), "") == found


def test_a_version_with_fewer_blocks_is_compared_where_it_has_them_and_refused_at_once_elsewhere(
        text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shorter = (tiny_model("llama", max_position_embeddings=64, num_hidden_layers=count) for count in (3, 2))
    for place, block in enumerate((0, 2)):
        shorter.model.layers[place].load_state_dict(model.model.layers[block].state_dict())
    recipe = RECIPE.replace([f"evaluate.text={beginning(text_file)}"])
    found = diagnose(model, tiny_tokenizer(), recipe=recipe, attacks=False, against=shorter, kept=[0, 2])
    assert len(found.fidelity.mass) == len(found.against.mixing) == 2
    assert found.text == str(beginning(text_file))
    monkeypatch.setattr(Walk, "steps", lambda _: pytest.fail("began"))
    with pytest.raises(RequestError, match="differ in width, depth, heads or vocabulary"):
        diagnose(model, tiny_tokenizer(), recipe=recipe, against=shorter)
    with pytest.raises(RequestError, match="not in memory"):
        diagnose(model, tiny_tokenizer(), recipe=recipe, against=copy.deepcopy(model).to("meta"))


def test_the_2_bit_cache_of_a_model_in_training_is_read_without_dropout(text_file: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=128, attention_dropout=0.5)
    job = _Inputs(Decoder.of(model), tiny_tokenizer(), text_file.read_text(), RECIPE)
    expected = _cache_defences(job, 1, sink_map_of(job.decoder), model, [])
    assert len(expected) == 6
    assert _cache_defences(job, 1, sink_map_of(job.decoder), model.train(), []) == expected
    assert model.training


def test_it_can_be_shown(planted: Diagnosis) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    marked = planted.model_copy(update={"model": planted.model.model_copy(update={"name": "[/b]planted"})})
    for table in tables(marked):
        console.print(table)
    console.print(scale_table([marked, planted]))
    shown = console.export_text()
    assert shown.count("[/b]planted") == 2
    assert "planted: sink rate of the first position" in shown
    assert "Heads that rest on the sinks" in shown
    assert shown.count("0.667 (0.667 to 0.667)") >= 4


def test_quarters_of_a_model_of_one_block(planted: Diagnosis) -> None:
    assert planted.depth is not None
    kinds = [one.model_copy(update={"settled": one.settled[:1]}) for one in planted.depth.kinds]
    shallow = planted.model_copy(update={"depth": planted.depth.model_copy(update={"blocks": 1, "kinds": kinds})})
    headers = [column.header for table in tables(shallow) for column in table.columns]
    assert [header for header in headers if str(header).startswith("settled by")] == ["settled by 1"]


def test_bos_is_tried_where_the_tokenizer_has_one_and_adds_none(text_file: Path) -> None:
    found = diagnose(tiny_model("llama", max_position_embeddings=70), tiny_tokenizer("none"),
                     str(beginning(text_file)), RECIPE, attacks=False)
    bare, fronted = found.spread
    assert (bare.with_bos, fronted.with_bos) == (False, True)
    assert fronted.position == bare.position + 1  # the same token of the text
    assert fronted.length == bare.length == 70
    assert [variant.name for variant in found.bos] == ["once", "none", "moved", "twice"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "gemma2"])
def test_every_family_without_bos(family: str, text_file: Path) -> None:
    tokenizer = tiny_tokenizer("none", has_bos=False)
    found = diagnose(tiny_model(family, max_position_embeddings=70) if family != "gpt2" else
                     tiny_model(family, n_positions=70), tokenizer, str(beginning(text_file)), RECIPE)
    assert found.bos == []
    assert [spread.with_bos for spread in found.spread] == [False]
    assert any("no <bos>" in note for note in found.notes)
    assert found.sink_rates[1].length == 70
    assert all(0 <= figure.row_entropy.value <= 1.0001 for figure in found.mixing)


def test_two_runs_are_the_same_and_the_model_is_left_alone(text_file: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (diagnose(model, tiny_tokenizer(), str(beginning(text_file)), RECIPE).to_json() for _ in range(2))
    assert first == second
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


def test_a_text_that_is_too_short_is_refused(tmp_path: Path, text_file: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w9 w10 w11", encoding="utf-8")
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="shorter than one row"):
        diagnose(model, tiny_tokenizer(), str(short), RECIPE)
    with pytest.raises(RequestError, match=r"shorter than one row: .* give more text\."):
        diagnose(model, tiny_tokenizer(), str(short), RECIPE, sink_map=sink_map_of(Decoder.of(model)))
    short.write_text(" ".join(f"w{word}" for word in range(9, 109)), encoding="utf-8")  # enough for sinks alone
    monkeypatch.setattr(Walk, "steps", lambda _: pytest.fail("began"))
    with pytest.raises(RequestError, match="shorter than one row"):
        diagnose(model, tiny_tokenizer(), str(short), RECIPE.replace([f"calibration.text={text_file}"]))
