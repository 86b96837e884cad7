"""What people read: one screen of 80 columns for a model of any size, in which no name is cut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from commands import call, one_sentence, settings
from families import tiny_mixture, tiny_model
from rich.table import Table
from sinkmaps import sink_map_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import Channel, Measure, Plan, Report, Row, SuperWeight
from sinkquant.cli import paper, plans
from sinkquant.cli.parts import kept_or_writable, writable
from sinkquant.cli.show import show_plan, show_sink_map
from sinkquant.cli.tables.names import in_words
from sinkquant.cli.tables.plan import alike, with_ranges
from sinkquant.cli.tables.report import result_table
from sinkquant.cli.tables.sinkmap import meaning
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.recipe import Recipe
from sinkquant.run import measure

LINES = 40
"""Of a tall terminal; most plans take half of it."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def deep(family: str = "llama", layers: int = 100) -> PreTrainedModel:
    """Shapes only."""
    config = AutoConfig.for_model(family, vocab_size=128, hidden_size=64, intermediate_size=128,
                                  num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """By what stands in the test's name."""
    return {"100 layers": deep, "33 layers": lambda: deep("qwen3", 33), "gpt2": lambda: tiny_model("gpt2"),
            "mixture": lambda: tiny_mixture("deepseek_v3")}[request.param]()


def plan_of(model: PreTrainedModel, *assignments: str) -> Plan:
    recipe = Recipe().replace(["weights.group_size=32", "kv_cache=null", *assignments])
    decoder = Decoder.of(model)
    risky = dict.fromkeys(list(decoder.linears)[::5], 0.9)
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, risky), recipe)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    return lines


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("model", ["100 layers", "33 layers", "gpt2", "mixture"], indirect=True)
@pytest.mark.parametrize("assignments", [
    (), ("protect.channels=module",),
    ("weights.overrides=[{pattern: '*.1.*', bits: 8, group_size: -1}, {pattern: '*.0.*', bits: 2}]",)],
    ids=["plain", "protected", "overrides"])
def test_a_plan_is_one_screen(model: PreTrainedModel, assignments: tuple[str, ...],
                              capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_of(model, *assignments)
    show_plan(made)
    lines = printed(capsys)
    assert len(lines) <= LINES
    text = " ".join(" ".join(lines).split())
    assert f"{len(made.modules)} linears, {made.bits_per_weight:.3f} bits per weight" in text
    assert f"{made.weight_bytes:,} bytes of" in text
    assert f"loads in {', '.join(made.loads_in)}" in text
    counts = [int(count.replace(",", "")) for count in re.findall(r"^  \S.*: ([\d,]+) linears?$", "\n".join(lines),
                                                                  re.MULTILINE)]
    assert sum(counts) == len(made.modules)  # every linear stands in one group


@pytest.mark.usefixtures("narrow")
def test_every_linear_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_of(deep(layers=12))
    show_plan(made, full=True)
    text = capsys.readouterr().out
    for name in made.modules:
        assert f"  {name}: " in text  # whole
    assert text.count("as weights.bits asks") == len(made.modules)


def test_names_in_words() -> None:
    names = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(4) for leaf in "qkv"]
    names += [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 3)]
    names += [f"model.layers.2.mlp.experts.{expert}.up_proj" for expert in range(8)]
    assert in_words(names, names) == ["layers 0-3: self_attn q/k/v_proj", "layers 0-1, 3: mlp down_proj",
                                      "layer 2: mlp.experts.* up_proj"]
    assert in_words(names[-3:], names) == ["layer 2: mlp.experts.* up_proj (3 of 8)"]
    assert in_words(["lm_head"], ["lm_head"]) == ["lm_head"]
    many = [f"layers.{layer}.x" for layer in range(0, 60, 2)]
    assert in_words(many, many)[0].startswith("layers 0, 2, 4, 6")
    assert in_words(many, many)[0].endswith("and 22 more: x")


def test_reasons_that_differ_in_numbers_are_one() -> None:
    reasons = {"a": "3 bits: asked; range 22.4 against 1,000", "b": "3 bits: asked; range 3.05e+03 against 15",
               "c": "3 bits: asked", "d": "with layers.1.x as int8",
               "e": "with layers.2.x as int8"}
    found = alike(reasons)
    assert found == {("# bits: asked", "range # against #"): ["a", "b"], ("# bits: asked",): ["c"],
                     ("with layers.*.x as int8",): ["d", "e"]}
    assert with_ranges([reasons[name].split("; ")[1] for name in "ab"]) == "range 22.4 to 3.05e+03 against 15 to 1,000"
    assert with_ranges(["channel 163 is born here", "channel 40 is born here"]) == "channel 40, 163 is born here"
    assert with_ranges(["in channels 163, 400 are", "in channels 200, 511 are"]) == "in channels 163, 200, 400, 511 are"
    assert with_ranges(["weight [10, 5] (+0.3)", "weight [20, 5] (+0.5)"]) == "weight [10 to 20, 5] (+0.3 to 0.5)"
    assert with_ranges([reasons["d"]]) == reasons["d"]
    assert with_ranges([reasons["d"], reasons["e"]]) == "with layers.*.x as int8"


@pytest.mark.usefixtures("narrow")
def test_a_sink_map_is_one_screen_that_ends_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    channel = Channel(channel=3, peak=9e4, ratio=5000.0, born="layers.0.mlp", ended=None, tokens=["<s>"])
    weight = SuperWeight(module="model.layers.1.mlp.down_proj", row=1, column=2, value=0.5, loss_increase=2.4)
    found = sink_map_of(Decoder.of(tiny_model("llama")), channels=(channel,), super_weights=(weight,))
    many = found.model_copy(update={"tokens": found.tokens * 40, "channels": found.channels * 40,
                                    "super_weights": found.super_weights * 40})
    show_sink_map(many)
    lines = printed(capsys)
    assert len(lines) <= LINES
    assert "--full shows all" in " ".join(lines)
    assert "For this model: '<s>' at position 0 takes 50% of all attention" in " ".join(lines)
    for words in ("90,000", "float16", "2.4 nats"):
        assert words in meaning(found)
    none = found.model_copy(update={"tokens": [], "channels": [], "super_weights": []})
    assert "no attention sinks" in meaning(none)


@pytest.mark.usefixtures("narrow")
def test_a_table_never_cuts_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.29.mlp.experts.127.down_proj"
    shown = Table("module", "reason", *"abcdef")
    shown.add_row(name, "because " * 20, *["0.123456"] * 6)
    paper.table(shown)
    paper.paragraph(f"{'x' * 60} {name}")
    assert capsys.readouterr().out.count(name) == 2


def test_quiet_prints_nothing_but_what_was_asked_for(tmp_path: Path, tiny_folder: Path, text_file: Path) -> None:
    arguments = ["plan", tiny_folder, "-r", "w8a16-sink-rtn", "-o", tmp_path / "plan.json", *settings(text_file)]
    loud, quiet, json = call(*arguments), call(*arguments, "--quiet"), call(*arguments, "-q", "--json")
    assert loud.out
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert json.out == (tmp_path / "plan.json").read_text(encoding="utf-8")
    wrong = call("plan", "nowhere", "-q")
    assert wrong.code == 2
    assert "nowhere" in wrong.err


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    assert "\x1b[3" not in call("recipes").out


@pytest.mark.parametrize("command", [(), ("run",), ("plan",), ("eval",)])
def test_the_help_says_what_exit_codes_mean(command: tuple[str, ...]) -> None:
    words = " ".join(call(*command, "--help").out.split())
    assert "0 done, 1 failed, 2 the request is wrong, 3 done but below the recipe's quality gate" in words


def test_plan_refuses_before_it_detects(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "find_sinks", None)
    refused = call("plan", tiny_folder, "-r", "w4a16-sink", "--set", "weights.group_size=32",
                   "--set", "budget={bits: 2.1, solver: sensitivity}")
    assert refused.code == 2
    assert "is not feasible" in refused.err


def test_eval_takes_all_documents_and_writes_json(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    limited = Recipe().replace(["evaluate.limit=3"])
    monkeypatch.setattr(measure, "recorded_recipe", lambda _: limited)
    monkeypatch.setattr(measure, "evaluate_folder", lambda _folder, recipe, *_: seen.append(recipe))
    call("eval", tiny_folder)
    assert seen[0].evaluate.limit is None
    refused = call("eval", tiny_folder, "-o", "report.html")
    assert refused.code == 2
    assert "report.html is none of the files that are written; end it in .json." in refused.err


def test_a_home_is_where_files_are_written_whoever_reads_the_name(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads `~` behind an equals sign; a name that begins with it and is no user is a name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "costs.json").touch()
    assert writable(Path("~/plan.json")) == tmp_path / "plan.json"
    assert kept_or_writable(Path("~/costs.json")) == tmp_path / "costs.json"
    assert writable(Path("~plan.json")) == kept_or_writable(Path("~plan.json")) == Path("~plan.json")
    assert "'nowhere' is not a model folder" in one_sentence(call("run", "-m", "nowhere", "-o", "~out"))


def test_a_task_without_a_main_metric_shows_all_that_it_has() -> None:
    def row(name: str, **tasks: dict[str, float]) -> Row:
        return Row(name=name, path=name, weight_bytes=1, bits_per_weight=4, tasks={
            task: {metric: Measure(value=value, stderr=None) for metric, value in found.items()}
            for task, found in tasks.items()})

    made = Report.model_construct(rows=[
        row("unquantized", gsm8k={"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.6}),
        row("sink_aware", gsm8k={"exact_match,strict-match": 0.4}, arc={"acc": 0.3, "acc_norm": 0.2},
            divergence={"kl": 0.1})])
    shown = result_table(made)
    assert [column.header for column in shown.columns][5:] == [
        "gsm8k exact_match,strict-match", "gsm8k exact_match,flexible-extract", "arc acc", "divergence kl"]
    assert [list(column.cells) for column in shown.columns][5:] == [["0.5", "0.4"], ["0.6", ""], ["", "0.3"],
                                                                    ["", "0.1"]]
