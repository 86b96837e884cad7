"""Checkpoints of several formats in one table: every figure against an independent one, what is marked, what is warned
of."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import quantized, weight_bytes
from commands import call, one_sentence
from families import tiny_model
from gguf_files import write_gguf
from small_runs import model_folder
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.artifacts.comparison import ComparedRow, Interval
from sinkquant.compare.figures import with_front
from sinkquant.errors import RequestError
from sinkquant.models import read_text, token_rows
from sinkquant.report.compared import markdown, page, sentence
from sinkquant.run.measure import evaluate_folder

SMALL = ["evaluate.divergence_rows=6", "evaluate.divergence_length=48", "detect.rows=8", "detect.long_rows=1"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> list[Path]:
    """Ours at 4 and 3 bits, GPTQ's format, quanto's, a GGUF file of 8 bits; and the model itself once more."""
    root = tmp_path_factory.mktemp("compared")
    found = []
    for name, bits, more in (("w4", 4, ()), ("w3", 3, ()), ("gptq", 4, ("backend=gptq",)),
                             ("quanto", 8, ("backend=quanto", "weights.group_size=-1"))):
        model, _, sink_map = quantized(text_file, bits=bits, more=more)
        sq.save(model, tiny_tokenizer(), root / name, sink_map)
        found.append(root / name)
    write_gguf(root / "tiny.gguf", "Q8_0")
    tiny_model("llama").save_pretrained(root / "again")
    tiny_tokenizer().save_pretrained(root / "again")
    return [*found, root / "tiny.gguf", root / "again"]


@pytest.fixture(scope="module")
def made(places: list[Path], tiny_folder: Path, text_file: Path) -> sq.Comparison:
    recipe = sq.Recipe().replace(SMALL)
    return sq.compare(places, tiny_folder, text=text_file, recipe=recipe)


def test_every_figure_is_what_plain_transformers_gives(made, places, tiny_folder, text_file):
    rows = token_rows(tiny_tokenizer(), read_text(text_file, "evaluation"), 6, 48)
    base = sq.load(tiny_folder)[0]
    with torch.no_grad():
        p = torch.log_softmax(base(rows).logits.double(), -1)
        for place in places[:3]:
            row = next(one for one in made.rows if one.name == place.name)
            q = torch.log_softmax(sq.load(place, torch.float32)[0](rows).logits.double(), -1)
            kl = (p.exp() * (p - q)).sum(-1)
            loss = -q[:, :-1].gather(-1, rows[:, 1:, None]).mean()
            assert row.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
            assert row.kl_99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-3)
            assert row.kl_by_position[0].kl == pytest.approx(float(kl[:, 0].mean()), rel=1e-2, abs=1e-6)
            assert row.same_top.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
            assert row.perplexity.value == pytest.approx(math.exp(float(loss)), rel=1e-4)
            assert row.kl.low < row.kl.value < row.kl.high
            assert row.bytes == weight_bytes(place)
            assert row.sinks in ("kept", "changed", "destroyed", "no sinks")


def test_the_table_is_sorted_and_says_what_cannot_be_told(made, places):
    kinds = [row.kind for row in made.rows]
    assert kinds == ["baseline", *["checkpoint"] * len(places), "floor", "floor"]
    models = [row for row in made.rows if row.kind == "checkpoint"]
    assert [row.bytes for row in models] == sorted(row.bytes for row in models)
    by_name = {row.name: row for row in made.rows}
    assert by_name["w3"].kl.value > by_name["w4"].kl.value > by_name["tiny.gguf"].kl.value > 0
    assert by_name["tiny.gguf"].format == "GGUF Q8_0"
    assert 8 < by_name["tiny.gguf"].bits_per_weight < 9.5  # 8.5 for Q8_0, and norms in 32 bits
    assert by_name["again"].kl.value == 0
    assert by_name["again"].pareto
    assert any(warning.startswith("again: no farther from the baseline") for warning in made.warnings)
    floor = by_name["unquantized in bfloat16"]
    assert 0 < floor.kl.value < by_name["w4"].kl.value
    assert by_name["unquantized, rows one by one"].kl.value < floor.kl.value


@pytest.mark.parametrize("kind", [str, Path])
def test_one_checkpoint_need_not_be_a_list(kind, tmp_path):
    with pytest.raises(RequestError, match=f"{tmp_path / 'w4'}"):  # not its first letter
        sq.compare(kind(tmp_path / "w4"), "demo")


def test_the_front_is_of_size_and_divergence_together():
    def row(name: str, size: int, kl: float) -> ComparedRow:
        one = Interval(value=kl, low=kl, high=kl)
        return ComparedRow(name=name, path=name, kind="checkpoint", format="", bytes=size, bits_per_weight=1, kl=one,
                           perplexity=one)

    found = with_front([row("large", 9, 0.1), row("beaten", 8, 0.3), row("small", 5, 0.3), row("same", 5, 0.3),
                        row("smallest", 4, 0.9)])
    assert [(one.name, one.pareto) for one in found] == [
        ("smallest", True), ("same", True), ("small", True), ("beaten", False), ("large", True)]


def test_reports_hold_every_model_and_warning(made):
    for written in (markdown(made), page(made)):
        assert all(row.name in written for row in made.rows)
        assert all(warning[:40] in written for warning in made.warnings)
    assert page(made).count("<svg") == 1
    assert page(made).count('class="n value"') == 6
    large = [row.model_copy(update={"bytes": 4_100_000_000}) for row in made.rows]
    assert "again comes closest: KL 0 nats at 4,100 MB" in sentence(made.model_copy(update={"rows": large}))


def test_the_command(places, tiny_folder, text_file, tmp_path):
    arguments = ["compare", places[0], places[4], "--baseline", tiny_folder, "--text", text_file, "--no-sinks",
                 *(part for one in SMALL for part in ("--set", one))]
    done = call(*arguments, "-o", tmp_path / "table.md")
    assert done.code == 0, done.err
    assert "GGUF Q8_0" in done.out
    assert "| w4 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    found = json.loads(call(*arguments, "--json", "--tasks", "sink_perplexity", "--set", "evaluate.limit=2").out)
    assert found["rows"][1]["tasks"]["sink_perplexity"]["byte_perplexity"]["value"] > 1


@pytest.mark.parametrize("wrong", [("w4", "w4"), ("nowhere",)])
def test_what_is_no_checkpoint_is_refused(wrong, places, tiny_folder):
    done = call("compare", *(places[0].parent / name for name in wrong), "--baseline", tiny_folder)
    assert done.code == 2


def test_a_model_with_fewer_heads_is_compared_without_its_sinks(tiny_folder, text_file, tmp_path):
    small = model_folder(tmp_path / "small", num_attention_heads=2, num_key_value_heads=1)
    found = sq.compare([str(small)], str(tiny_folder), text=str(text_file), recipe=sq.Recipe().replace(SMALL))
    row = found.rows[1]
    assert row.kl.value > 0
    assert row.sinks is None


def test_eval_beside_a_model_with_more_heads_leaves_out_the_sinks(tiny_folder, text_file, tmp_path):
    model, _, sink_map = quantized(text_file, num_attention_heads=2, num_key_value_heads=1)
    recipe = sq.Recipe().replace([*SMALL, "evaluate.tasks=[sink_perplexity]", "evaluate.limit=2",
                                   f"evaluate.text={text_file}"])
    sq.save(model, tiny_tokenizer(), tmp_path / "w4", sink_map)
    found = evaluate_folder(tmp_path / "w4", recipe, str(tiny_folder))
    assert found.fidelity is None
    assert "the baseline has other numbers of layers or heads" in found.verdict.details[-1]


def test_a_runs_folder_can_be_the_baseline(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "out" / "model")
    for command in ("compare", "explain"):
        assert "nowhere" in one_sentence(call(command, "nowhere", "--baseline", tmp_path / "out"))


def test_a_quantized_baseline_is_refused(places, tiny_folder, tmp_path):
    shutil.copytree(places[0], tmp_path / "out" / "model")
    for command in ("compare", "explain", "eval"):
        done = call(command, tiny_folder, "--baseline", tmp_path / "out" / ("model" if command == "eval" else ""))
        assert "model is quantized (compressed-tensors), and a baseline is the unquantized model" in one_sentence(done)


def test_a_folder_without_tasks_is_refused_before_anything_is_loaded(places, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["sinkquant.compare.compare"], "load_model", lambda *_: pytest.fail("loaded"))
    recipe = sq.Recipe.for_comparison().replace([f"evaluate.task_folder={tmp_path}"])
    with pytest.raises(RequestError, match="holds no lm-eval task file"):
        sq.compare([str(places[0])], str(tiny_folder), recipe=recipe)


def test_a_report_of_no_known_kind_is_refused(places, tiny_folder):
    done = call("compare", places[0], "--baseline", tiny_folder, "-o", "table.xlsx")
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_eval_of_a_gguf_file_counts_its_own_bytes(made, places, tiny_folder, text_file):
    recipe = sq.Recipe().replace([*SMALL, "evaluate.tasks=[sink_perplexity]", "evaluate.limit=2",
                                   f"evaluate.text={text_file}"])
    unquantized, row = evaluate_folder(places[-2], recipe, str(tiny_folder)).rows
    beside = evaluate_folder(tiny_folder, recipe, str(places[-2]))
    assert beside.rows[0].weight_bytes == row.weight_bytes
    assert any("tiny.gguf, where they were quantized before (Q8_0)" in note for note in beside.notes)
    assert unquantized.weight_bytes == weight_bytes(tiny_folder)
    compared = next(one for one in made.rows if one.name == "tiny.gguf")
    assert row.weight_bytes == compared.bytes
    assert row.bits_per_weight == pytest.approx(compared.bits_per_weight, rel=0.01)


def test_a_baseline_that_was_quantized_before_is_said_to_be(places, text_file):
    recipe = sq.Recipe.for_comparison().replace(SMALL)
    found = sq.compare([str(places[-1])], str(places[-2]), text=str(text_file), recipe=recipe, sinks=False)
    assert "tiny.gguf, where they were quantized before (Q8_0)" in found.warnings[0]
