"""quantize-model as a user meets it: exit codes, one sentence per error, artifacts on stdout and all else on stderr."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import quantized
from commands import Outcome, call, one_sentence, settings
from forked import Program, command_line, start
from safetensors.torch import load_file, save_file
from small_runs import fingerprint, model_folder
from tiny_tokenizer import tiny_tokenizer

from sinkquant import Plan, Report, SinkMap, __version__, save
from sinkquant.cli.parts import task_names
from sinkquant.run import job


@pytest.fixture
def source(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny model that has to come out of the test as it went in."""
    return shutil.copytree(tiny_folder, tmp_path / "source")


def test_help_version_and_recipes():
    assert call("--version").out == f"quantize-model {__version__}\n"
    assert call().code == 2
    for command in ("run", "detect", "plan", "eval", "report", "doctor", "recipes"):
        assert command in call("--help").out
        assert call(command, "--help").code == 0
    assert "w4-kv2-sink: The default." in call("recipes").out
    assert "group_size: 64" in call("recipes", "show", "w3a16-sink").out
    wrong = call("recipes", "show", "w3a16-sank")
    assert wrong.code == 2
    assert "did you mean 'w3a16-sink'" in one_sentence(wrong)


def test_step_by_step(tmp_path, small_folder, text_file, monkeypatch):
    """detect, plan, an edited plan, run, eval, report: each command takes what the one before made."""
    found = call("detect", small_folder, "--text", text_file, "--json", "-o", tmp_path / "sinkmap.json",
                 "--set", "detect.rows=8", "--set", "detect.long_rows=1")
    assert found.code == 0
    assert SinkMap.parse(json.loads(found.out), "stdout") == SinkMap.load(tmp_path / "sinkmap.json")

    planned = call("plan", small_folder, "--sink-map", tmp_path / "sinkmap.json", "-r", "w3a16-sink", "--json", "-o",
                   tmp_path / "plan.json", *settings(text_file))
    assert planned.code == 0
    plan = Plan.parse(json.loads(planned.out), "stdout")
    assert plan == Plan.load(tmp_path / "plan.json")
    assert {decision.bits for decision in plan.modules.values()} == {3}

    name = "model.layers.0.mlp.down_proj"
    plan.modules[name].bits = 8
    plan.save(tmp_path / "plan.json")
    output = tmp_path / "out"
    done = call("run", "--plan", tmp_path / "plan.json", "--model", small_folder, "--output", output)
    assert done.code == 0, done.err
    assert f"Report: {output / 'report.html'}" in " ".join(done.out.split())
    assert Plan.load(output / "plan.json").modules[name].bits == 8
    assert {one.quantity for one in Report.load(output / "report.json").forecasts} >= {
        "weight_bytes", "kl", "seconds to quantize sink_aware", "peak resident bytes"}
    both = call("run", "w4a16-sink", "--plan", tmp_path / "plan.json", "--model", small_folder, "-o", tmp_path / "no")
    assert both.code == 2
    assert "not both" in one_sentence(both)

    again = call("eval", output, "--baseline", small_folder, "--json", "--tasks", "sink_perplexity,sink_cloze",
                 "-o", tmp_path / "again.json")
    assert again.code == 0, again.err
    report = Report.parse(json.loads(again.out), "stdout")
    assert report == Report.load(tmp_path / "again.json")
    assert [set(row.tasks) for row in report.rows][1:] == [{"sink_perplexity", "sink_cloze", "divergence"}] * 2
    alone = call("eval", output / "model", "--text", text_file)
    assert alone.code == 0
    assert "not measured: there is no control" in alone.out

    page = (output / "report.html").read_bytes()
    (output / "report.html").unlink()
    assert call("report", output).code == 0
    assert call("report", output, "-o", tmp_path / "one.html").code == 0
    assert (tmp_path / "one.html").read_bytes() == (output / "report.html").read_bytes()
    assert (output / "report.html").read_bytes() == page
    with monkeypatch.context() as patched:
        patched.setenv("HOME", str(tmp_path))
        compared = call("report", output, output, "--output=~/two.html")
    assert compared.code == 0
    assert "2 runs side by side" in (tmp_path / "two.html").read_text(encoding="utf-8")


def test_doctor(small_folder, text_file):
    outcome = call("doctor", small_folder, "--text", text_file)
    assert outcome.code == 0
    assert "Tokenization" in outcome.out
    assert "Support" in outcome.out


def test_a_runs_folder_stands_for_its_checkpoint(tmp_path, small_folder, text_file):
    """To whatever looks at a model; its weights are quantized, which the doctor says."""
    assert call("run", "--model", small_folder, "--output", tmp_path / "run", *settings(
        text_file, "weights.method=rtn", "evaluate.skip=true")).code == 0
    outcome = call("doctor", tmp_path / "run", "--text", text_file)
    assert (outcome.code, outcome.err) == (0, "")
    assert "no: it is quantized already" in outcome.out
    assert "group sizes" not in outcome.out
    assert call("detect", tmp_path / "run", "--text", text_file, "--set", "detect.rows=4", "--set",
                "detect.long_rows=0", "--set", "detect.super_weights=false").code == 0


def test_plan_only_stops_before_quantizing(tmp_path, small_folder, text_file):
    outcome = call("run", "--model", small_folder, "--output", tmp_path / "out", "--plan-only", *settings(text_file))
    assert outcome.code == 0
    assert "bits per weight" in outcome.out
    assert not (tmp_path / "out" / "model").exists()
    assert Plan.load(tmp_path / "out" / "plan.json").modules


def test_a_result_below_the_gate_is_code_3(tmp_path, small_folder, text_file):
    outcome = call("run", "--model", small_folder, "--output", tmp_path / "out",
                   *settings(text_file, "gate.max_divergence=1.0e-12", "evaluate.control=false",
                             "evaluate.fidelity=false"))
    assert outcome.code == 3
    assert "over gate.max_divergence" in outcome.out
    assert Report.load(tmp_path / "out" / "report.json").verdict.gate == "failed"
    assert "Quality gate failed" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = call("eval", tmp_path / "out", "--baseline", small_folder)
    assert again.code == 3


def not_a_model(source: Path) -> None:
    (source / "config.json").unlink()


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def truncated(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(value: float):
    def write(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return write


def nothing(source: Path) -> None:
    pass


@pytest.mark.parametrize(("spoil", "arguments", "words"), [
    pytest.param(not_a_model, [], "it has no config.json", id="not a model folder"),
    pytest.param(no_tokenizer, [], "has no tokenizer", id="no tokenizer"),
    pytest.param(truncated, [], "is truncated", id="truncated shard"),
    pytest.param(not_finite(float("nan")), [], "up_proj.weight holds NaN or Inf", id="NaN"),
    pytest.param(not_finite(float("inf")), [], "up_proj.weight holds NaN or Inf", id="Inf"),
    pytest.param(nothing, ["--set", "calibration.text={empty}"], "is empty", id="empty text"),
    pytest.param(nothing, ["--set", "calibration.text={short}"], "shorter than one row", id="text shorter than a row"),
    pytest.param(nothing, ["--set", "calibration.text=/nowhere/x.txt"], "cannot read", id="no text"),
    pytest.param(nothing, ["--set", "weights.group_size=48"], "does not divide", id="group size"),
    pytest.param(nothing, ["--set", "weights.bitz=3"], "did you mean 'bits'", id="unknown key"),
    pytest.param(nothing, ["--set", "weights.bits"], "has no '='", id="assignment without a value"),
    pytest.param(nothing, ["--set", "weights.ignore=[model.layers.7.*]"], "model.layers.7", id="pattern, no match"),
    pytest.param(nothing, ["--no-such-option"], "--no-such-option", id="unknown option"),
])
def test_a_wrong_request_is_code_2(spoil, arguments, words, source, tmp_path, text_file):
    spoil(source)
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("w9 w10 .", encoding="utf-8")
    before = fingerprint(source)
    filled = [a.format(empty=tmp_path / "empty.txt", short=tmp_path / "short.txt") for a in arguments]
    outcome = call("run", "--model", source, "--output", tmp_path / "out", *settings(text_file), *filled)
    assert outcome.code == 2
    assert words in one_sentence(outcome)
    assert fingerprint(source) == before
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".*"))


def test_an_output_folder_that_is_not_empty_is_refused_and_kept(source, tmp_path, text_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    outcome = call("run", "--model", source, "--output", tmp_path / "out", *settings(text_file))
    assert outcome.code == 2
    assert "exists and is not empty" in one_sentence(outcome)
    assert fingerprint(tmp_path / "out").keys() == {"mine.txt"}


@pytest.mark.parametrize("arguments", [["eval", "nowhere"], ["report", "nowhere"], ["detect", "nowhere"],
                                       ["plan", "a/b/c"], ["doctor", "."], ["run", "no-such-recipe"],
                                       ["run", "--plan", "nowhere.json"], ["frobnicate"], ["recipes", "list"]])
def test_every_command_refuses_what_is_not_there(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(*arguments)
    assert outcome.code == 2
    one_sentence(outcome)
    assert outcome.out == ""
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_is_one_sentence_too(tmp_path, small_folder, text_file, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something\nnobody thought of")

    monkeypatch.setattr(job, "quantize_to", broken)
    outcome = call("run", "--model", small_folder, "--output", tmp_path / "out", *settings(text_file))
    assert outcome.code == 1
    assert "unexpected RuntimeError: something nobody thought of" in one_sentence(outcome)
    assert not list(tmp_path.glob("out*"))


def started(source: Path, output: Path, text: Path, *more: str, limit: int | None = None) -> Program:
    """A run in a process of its own. `limit`: no file may grow over so many bytes, as on a disk that is full."""
    said = text.parent / f"said {output.parent.name}"
    return start(said, command_line, limit=limit, argv=(
        "quantize-model", "run", "--model", str(source), "--output", str(output), *more, *settings(text)))


def test_a_disk_that_fills_while_saving(source, tmp_path, text_file):
    before = fingerprint(source)
    code, out, err = started(source, tmp_path / "out", text_file, limit=100_000).communicate()
    assert code == 1, err
    message = one_sentence(Outcome(1, out, err))
    assert "model" in message
    assert "too large" in message
    assert fingerprint(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle(signal_number, source, tmp_path, text_file):
    before = fingerprint(source)
    process = started(source, tmp_path / "out", text_file)
    process.wait_for(tmp_path / "out.partial" / "plan.json")
    process.send_signal(signal_number)
    code, out, err = process.communicate()
    assert code == 1
    assert "stopped before it was done; nothing half-written was left" in one_sentence(Outcome(1, out, err))
    assert fingerprint(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, small_folder, text_file, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "quantize_to", stopped)
    outcome = call("run", "--model", small_folder, "--output", tmp_path / "out", "--resume", *settings(text_file))
    assert outcome.code == 1
    kept = f"{tmp_path / 'out.partial'} keeps what was done (detect, plan); the same command with --resume"
    assert kept in one_sentence(outcome)
    assert (tmp_path / "out.partial" / "plan.json").is_file()


def test_text_from_a_folder_whose_name_is_no_yaml(tmp_path, small_folder, text_file):
    folder = tmp_path / "set #2: [a]"
    folder.mkdir()
    text = Path(shutil.copy(text_file, folder / "text.txt"))
    fast = ["--set", "detect.rows=8", "--set", "detect.long_rows=1", "--set", "detect.super_weights=false"]
    assert call("detect", small_folder, "--text", text, *fast).code == 0
    assert call("run", "--model", small_folder, "--output", tmp_path / "out", "--plan-only", *settings(text)).code == 0


def test_killed_and_resumed(source, tmp_path, text_file):
    process = started(source, tmp_path / "out", text_file, "--resume", "--set", "evaluate.fidelity=false")
    process.wait_for(tmp_path / "out.partial" / "model")
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    checkpoint = fingerprint(tmp_path / "out.partial" / "model")
    other = call("run", "--model", source, "--output", tmp_path / "out", "--resume", *settings(
        text_file, "evaluate.fidelity=false", "seed=7"))
    assert other.code == 2
    assert "made with another recipe" in one_sentence(other)
    outcome = call("run", "--model", source, "--output", tmp_path / "out", "--resume", *settings(
        text_file, "evaluate.fidelity=false"))
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not list((tmp_path / "out").glob(".*"))
    made = fingerprint(tmp_path / "out" / "model")
    assert made.pop("README.md")  # the card, which comes with the report
    assert made == checkpoint
    assert (tmp_path / "out" / "report.html").is_file()


def test_another_kind_of_model_from_the_shell(tmp_path, text_file):
    """A Gemma 2 in float16 whose tokenizer adds no <bos>, by a relative path with a space in it."""
    model_folder(tmp_path / "my model", "gemma2", torch.float16, add_bos="none")
    command = [sys.executable, "-m", "sinkquant.cli", "detect", "my model", "--text", str(text_file), "--json",
               "--set", "detect.rows=8", "--set", "detect.long_rows=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = SinkMap.parse(json.loads(done.stdout), "stdout")
    assert found.tokenization.adds_bos == "none"
    assert done.stderr == ""


def test_what_would_change_nothing_beside_a_plan_is_refused(tmp_path, small_folder, text_file):
    planned = call("plan", small_folder, "-r", "w4a16-sink", "-o", tmp_path / "plan.json", *settings(
        text_file, "protect.tokens=false", "weights.method=rtn"))
    assert planned.code == 0, planned.err
    for key in ("weights={bits: 3}", " weights.bits=3", "kv_cache.window=64", "activations.format=int8",
                "backend=gptq", "engine=vllm-cuda", "sensitivity.rows=4"):
        outcome = call("run", "--plan", tmp_path / "plan.json", "--model", small_folder, "-o", tmp_path / "out",
                       "--set", key)
        assert outcome.code == 2, key
        assert "edit the plan instead" in one_sentence(outcome)
    assert call("run", "--plan", tmp_path / "plan.json", "--model", small_folder, "-o", tmp_path / "out",
                "--plan-only", "--set", "evaluate.batch_size=2", "--set", "seed=7").code == 0


def test_a_plan_names_the_text_that_it_was_asked_for(tmp_path, small_folder, text_file):
    asked = ("plan", small_folder, "-r", "w4a16-sink", "-o", tmp_path / "plan.json", *settings(
        text_file, "protect.tokens=false", "weights.method=rtn"))
    assert call(*asked, "--text", text_file).code == 0
    assert Plan.load(tmp_path / "plan.json").calibration.text == str(text_file)
    missing = call(*asked, "--text", tmp_path / "nowhere.txt")
    assert missing.code == 2
    assert "nowhere.txt" in one_sentence(missing)


def test_a_folder_where_a_file_goes_is_refused_before_the_work(tmp_path, small_folder):
    for command in (("detect",), ("plan",), ("sensitivity",), ("advise",), ("diagnose",)):
        outcome = call(*command, small_folder, "-o", tmp_path)
        assert outcome.code == 2
        assert "is a directory" in " ".join(outcome.err.split())


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, small_folder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    inside, closed = tmp_path / "file" / "made" / "x.json", tmp_path / "made" / "x.json"
    for command in ("detect -o", "plan -o", "sensitivity -o", "advise -o", "diagnose -o", "diagnose --depth-plot"):
        name, option = command.split()
        for path, why in ((inside, "file is no folder"), (closed, "is not yours to write into")):
            assert why in one_sentence(call(name, small_folder, option, path))
    assert "is not yours" in one_sentence(call("imatrix", small_folder, "-o", tmp_path / "i.gguf"))
    assert "is not yours" in one_sentence(call("run", "-m", small_folder, "-o", tmp_path / "out"))
    assert not (tmp_path / "made").exists()


def test_names_by_commas():
    assert task_names("a, b,,c ,") == ["a", "b", "c"]
    assert task_names(None) == task_names(" ,") == []


def test_checkpoints_of_other_libraries_are_looked_at(tmp_path, text_file):
    model, _, sink_map = quantized(text_file, more=("backend=gptq",))
    save(model, tiny_tokenizer(), tmp_path / "gptq", sink_map)
    outcome = call("doctor", tmp_path / "gptq", "--text", text_file)
    assert outcome.code == 0, outcome.err
    assert "no: it is quantized already" in outcome.out
    found = call("detect", tmp_path / "gptq", "--text", text_file, "--set", "detect.rows=4", "--set",
                 "detect.long_rows=0", "--set", "detect.super_weights=false")
    assert found.code == 0, found.err


def test_plan_only_does_not_resume_a_whole_run(tmp_path, small_folder, text_file, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "quantize_to", stopped)
    asked = ("run", "--model", small_folder, "--output", tmp_path / "out", "--resume", *settings(text_file))
    assert call(*asked).code == 1
    assert "--plan-only" in one_sentence(call(*asked, "--plan-only"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_evaluated_says_so_and_how_to(tmp_path, small_folder, text_file, monkeypatch):
    output = tmp_path / "my out"
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    monkeypatch.chdir(tmp_path)
    done = call("run", "--model", small_folder, "--output", output, *settings(
        Path(text.name), "weights.method=rtn", "kv_cache=null", "evaluate.skip=true"))
    said = " ".join(done.out.split())
    assert f"Checkpoint, not evaluated: {output / 'model'}" in said
    assert f"quantize-model eval '{output}' --baseline {small_folder}" in said
    assert "was not evaluated" in one_sentence(call("report", output))
    monkeypatch.chdir(tmp_path.parent)
    assert "give --text" in one_sentence(call("eval", output))


def test_files_of_kinds_that_are_not_written_are_refused(tmp_path, small_folder):
    for arguments in (("report", tmp_path, "-o", tmp_path / "report.md"),
                      ("report", tmp_path, tmp_path, "-o", tmp_path / "report.md"),
                      ("plan", small_folder, "--frontier", "-r", "w4a16-sink", "-o", tmp_path / "front.md")):
        assert "end it in .html" in one_sentence(call(*arguments))
