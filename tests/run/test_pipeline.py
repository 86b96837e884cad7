"""From model to report on models nobody has seen, and everything that can go wrong between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import fingerprint, model_folder, small_recipe
from transformers import AutoModelForCausalLM

from sinkquant import Plan, Report, RequestError, Sensitivity, SinkquantError, run
from sinkquant.cli import app
from sinkquant.run import job
from sinkquant.run.candidates import bits_on_disk
from sinkquant.run.measure import evaluate_folder, recorded_recipe

UNTIMED = {"report.json", "report.md", "report.html", "run.log"}
"""Files that hold seconds and peak memory beside results."""


@pytest.mark.parametrize(("family", "dtype", "options"), [
    pytest.param("qwen3", torch.float32, {"has_bos": False, "max_position_embeddings": 128},
                 id="qwen3, tokenizer without <bos>"),
    pytest.param("gemma2", torch.float16, {"add_bos": "none", "max_position_embeddings": 128},
                 id="gemma2, float16, <bos> not added"),
    pytest.param("opt", torch.bfloat16, {"shard": "60KB", "max_position_embeddings": 128}, id="opt, sharded"),
    pytest.param("llama", torch.float32, {"tie_word_embeddings": True}, id="llama, tied"),
])
def test_any_model_from_end_to_end(family, dtype, options, tmp_path, text_file, monkeypatch):
    folder = model_folder(tmp_path / "a model", family, dtype, **options)
    before = fingerprint(folder)
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(text_file, "evaluate.tasks=[sink_perplexity, sink_cloze]", "calibration.length=512",
                          "evaluate.divergence_length=512", "weights.bits=3")
    report = run(recipe, Path("a model"), "the output")
    assert report is not None
    output = tmp_path / "the output"
    assert [row.name for row in report.rows] == ["unquantized", "sink_aware", "control"]
    for row in report.rows[1:]:
        assert set(row.tasks) == {"sink_perplexity", "sink_cloze", "divergence"}
        assert row.tasks["divergence"]["kl"].value > 0
    plan = Plan.load(output / "plan.json")
    assert abs(report.rows[1].weight_bytes / plan.weight_bytes - 1) < 0.01
    assert abs(report.rows[1].weight_bytes / report.rows[2].weight_bytes - 1) < 0.01
    assert report.rows[0].bits_per_weight == pytest.approx(32 if dtype == torch.float32 else 16, abs=0.01)
    positions = options.get("max_position_embeddings", 256)
    assert f"calibration rows have {positions} tokens instead of 512: that is the model's context" in report.notes
    assert report.evaluation["length"] == positions
    assert Report.load(output / "report.json") == report
    assert AutoModelForCausalLM.from_pretrained(output / "model").config.model_type == family
    assert sorted(path.name for path in output.iterdir()) == [
        "model", "model-control", "plan-control.json", "plan.json", "report.html", "report.json", "report.md",
        "run.log", "sinkmap-control.json", "sinkmap-sink_aware.json", "sinkmap.json"]
    assert "peak resident bytes" in report.resources
    taken = {name for name in report.resources if name.startswith("seconds: ")}
    predicted = {name.removeprefix("predicted ") for name in report.resources if name.startswith("predicted sec")}
    assert taken - {"seconds: plan"} == predicted  # planning computes nothing that would be predicted
    assert len(taken) > 2
    log = (output / "run.log").read_text(encoding="utf-8")
    assert "bytes written" in log
    assert report.verdict.sentence in log
    assert fingerprint(folder) == before


def untimed(report: Report) -> Report:
    """Without what a clock and the machine's memory say."""
    told = [one for one in report.forecasts if one.row != "run"]
    return report.model_copy(update={"resources": {}, "forecasts": told})


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, small_folder, text_file, monkeypatch):
    recipe = small_recipe(text_file)
    whole = run(recipe, small_folder, tmp_path / "whole")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "make_control", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, small_folder, tmp_path / "parts", resume=True)
    partial = tmp_path / "parts.partial"
    assert (partial / "plan.json").is_file()
    (partial / ".model.killed").mkdir()  # what a kill -9 leaves of a checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, small_folder, tmp_path / "parts", resume=True)
    assert (partial / "model" / "model.safetensors").is_file()

    with pytest.raises(RequestError, match="made with another recipe"):
        run(recipe.replace(["seed=1"]), small_folder, tmp_path / "parts", resume=True)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(job, "quantize_to", never)
    parts = run(recipe, small_folder, tmp_path / "parts", resume=True)
    assert parts is not None
    assert whole is not None
    assert not partial.exists()
    one, two = ({name: value for name, value in fingerprint(tmp_path / place).items() if name not in UNTIMED}
                for place in ("whole", "parts"))
    assert one == two
    assert untimed(parts) == untimed(whole)
    assert parts.resources["seconds: detect"] > 0  # counted over the attempts


def test_an_interrupted_run_leaves_nothing(tmp_path, small_folder, text_file, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "evaluate", interrupted)
    (tmp_path / "out").mkdir()  # an empty folder is fine
    with pytest.raises(KeyboardInterrupt):
        run(small_recipe(text_file, "evaluate.control=false"), small_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def planned(tmp_path_factory, small_folder, text_file):
    """A plan of the tiny model."""
    folder = tmp_path_factory.mktemp("planned") / "out"
    assert run(small_recipe(text_file), small_folder, folder, plan_only=True) is None
    return folder / "plan.json"


def test_an_edited_plan_is_carried_out(tmp_path, small_folder, text_file, planned):
    recipe = small_recipe(text_file, "evaluate.control=false", "evaluate.fidelity=false")
    made = Plan.load(planned)
    name = "model.layers.1.mlp.down_proj"
    content = json.loads(made.to_json())
    content["modules"][name] |= {"bits": 8, "group_size": -1, "method": "rtn"}
    edited = Plan.parse(content, "edited")
    report = run(recipe, small_folder, tmp_path / "out", edited=edited)
    assert report is not None
    done = Plan.load(tmp_path / "out" / "plan.json")
    assert done.modules[name].bits == 8
    assert done.weight_bytes > made.weight_bytes
    assert done.weight_bytes == report.row("sink_aware").weight_bytes
    assert done.modules[name].bytes > made.modules[name].bytes
    assert done.bits_per_weight > made.bits_per_weight


@pytest.mark.parametrize(("name", "change", "message"), [
    ("model.layers.1.mlp.down_proj", {"group_size": 48}, "does not divide"),
    ("model.layers.1.mlp.down_proj", {"bits": 9}, "8 or 16"),
    ("model.layers.1.mlp.down_proj", {"bits": 16}, "'none' belongs to 16 bits"),
    ("model.layers.1.self_attn.q_proj", {"bits": 8}, "engines fuse them"),
    ("model.layers.9.mlp.down_proj", {}, "did you mean"),
    ("model.layers.1.mlp.down_proj", None, "lacks"),
])
def test_an_edited_plan_that_does_not_fit_is_refused(name, change, message, tmp_path, small_folder, text_file, planned,
                                                     monkeypatch):
    monkeypatch.setattr(job, "detect", None)  # refused before
    recipe = small_recipe(text_file)
    content = json.loads(planned.read_text(encoding="utf-8"))
    if change is None:
        del content["modules"][name]
    else:
        content["modules"][name] = content["modules"]["model.layers.1.mlp.down_proj"] | change
    with pytest.raises(RequestError, match=message):
        run(recipe, small_folder, tmp_path / "out", edited=Plan.parse(content, "edited"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_evaluating_a_folder_again(tmp_path, small_folder, text_file):
    recipe = small_recipe(text_file, "calibration.bos=never", "gate.max_sink_rate_change=0.5",
                          "evaluate.fidelity=false")
    made = run(recipe, small_folder, tmp_path / "out")
    assert made is not None
    assert recorded_recipe(tmp_path / "out") == recipe
    again = evaluate_folder(tmp_path / "out", recorded_recipe(tmp_path / "out"), str(small_folder))
    assert [row.tasks for row in again.rows] == [row.tasks for row in made.rows]
    assert again.paired == made.paired
    assert again.verdict == made.verdict
    assert again.verdict.gate == "passed"

    alone = evaluate_folder(tmp_path / "out" / "model-control", recipe.replace(["gate.max_sink_rate_change=null"]))
    assert [row.name for row in alone.rows] == ["control"]
    assert alone.rows[0].tasks["sink_perplexity"] == made.row("control").tasks["sink_perplexity"]
    assert alone.verdict.answer == "not measured"

    without = evaluate_folder(tmp_path / "out", recipe.replace(["gate.max_sink_rate_change=null",
                                                                "evaluate.control=false"]))
    assert [row.name for row in without.rows] == ["sink_aware"]

    foreign = shutil.copytree(tmp_path / "out" / "model", tmp_path / "foreign")
    (foreign / "sinkquant.json").unlink()
    assert recorded_recipe(foreign).name == "custom"
    found = evaluate_folder(foreign, recipe.replace(["gate.max_sink_rate_change=null"]), str(small_folder))
    assert [row.name for row in found.rows] == ["unquantized", "quantized"]
    assert {(pair.a, pair.b) for pair in found.paired} == {("quantized", "unquantized")}


def test_bits_on_disk_count_packed_values_and_their_scales(tmp_path, tiny_folder, text_file):
    run(small_recipe(text_file, "evaluate.skip=true"), tiny_folder, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "plan.json")
    # The plan's figure counts the file's header too, which weighs in so small a model.
    assert bits_on_disk(tmp_path / "out" / "model") == pytest.approx(plan.bits_per_parameter, rel=0.08)
    assert bits_on_disk(tiny_folder) == 32


def test_bits_on_disk_of_fp4_that_others_wrote(tmp_path: Path) -> None:
    """Two values in a byte, and no tensor with the shape."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight_packed": torch.zeros(256, 32, dtype=torch.uint8),
               "a.weight_scale": torch.zeros(256, 4, dtype=torch.float8_e4m3fn),
               "a.weight_global_scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert bits_on_disk(tmp_path) == 8 * (256 * 36 + 4) / (256 * 64)


def test_a_calibration_text_shorter_than_asked_is_noted(tmp_path, small_folder, text_file):
    few = tmp_path / "few.txt"
    few.write_text(text_file.read_text(encoding="utf-8")[:1_500], encoding="utf-8")
    run(small_recipe(few, f"evaluate.text={text_file}", "calibration.rows=50"), small_folder, tmp_path / "out",
        plan_only=True)
    notes = Plan.load(tmp_path / "out" / "plan.json").notes
    assert any("rows of 64 tokens; 50 were asked for" in note for note in notes)


def test_what_cannot_be_done_is_refused_before_the_work(tmp_path, small_folder, text_file, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(job, "quantize_to", never)
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n", encoding="utf-8")
    short.write_text("w9 w10 w11 .", encoding="utf-8")
    for assignment, message in [(f"calibration.text={empty}", "is empty"), (f"calibration.text={short}", "shorter"),
                                (f"evaluate.text={empty}", "is empty"),
                                ("weights.group_size=48", "does not divide"), ("weights.ignore=[lm_heat]", "lm_heat")]:
        with pytest.raises(RequestError, match=message):
            run(small_recipe(text_file, assignment), small_folder, tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()


def test_a_quantized_model_is_refused_before_its_sinks_are_found(tmp_path, text_file):
    folder = model_folder(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}}))
    with pytest.raises(RequestError, match="quantized already"):
        run(small_recipe(text_file), folder, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(RequestError, match="quantized already"):
        app(["plan", str(folder), "--set", f"calibration.text={text_file}"], standalone_mode=False)


def test_a_result_that_is_not_finite_stops_the_run(tmp_path, text_file):
    folder = model_folder(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e30)
    model.save_pretrained(folder)
    with pytest.raises(SinkquantError, match=r"layers\.1 are not finite"):
        run(small_recipe(text_file), folder, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_control_s_plan_is_carried_out_like_any_other(tmp_path, small_folder, text_file):
    recipe = small_recipe(text_file)
    run(recipe, small_folder, tmp_path / "one")
    control = Plan.load(tmp_path / "one" / "plan-control.json")
    report = run(recipe, small_folder, tmp_path / "two", edited=control)
    assert [row.name for row in report.rows][:3] == ["unquantized", "sink_aware", "control"]
    made, before = tmp_path / "two" / "model", tmp_path / "one" / "model-control"
    assert (made / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("settings", "said"), [
    (["evaluate.tasks=[sink_recall]", "evaluate.window=64"], "the model's context is too short for sink_recall"),
    (["evaluate.generation_rows=1"], "are 512 tokens together, and the model has positions for")], ids=str)
def test_an_evaluation_without_room_is_refused_before_detection(tmp_path, small_folder, text_file, settings, said,
                                                                monkeypatch):
    monkeypatch.setattr(job, "detect", lambda *_, **__: pytest.fail("detected"))
    with pytest.raises(RequestError, match=said):
        run(small_recipe(text_file).replace(settings), small_folder, tmp_path / "out")


def test_a_run_resumed_with_other_sensitivities_is_refused(tmp_path, small_folder, text_file, monkeypatch):
    recipe = small_recipe(text_file).replace(["sensitivity.rows=8", "sensitivity.length=32"])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "quantize_to", interrupted)
    monkeypatch.setenv("HOME", str(tmp_path))
    costs = "~/costs.json"
    with pytest.raises(RequestError, match="nothing can be written into"):
        run(recipe, small_folder, tmp_path / "out", sensitivity=text_file / "costs.json")
    for _ in range(2):  # the file that the first attempt writes is what the second one finds
        with pytest.raises(KeyboardInterrupt):
            run(recipe, small_folder, tmp_path / "out", sensitivity=costs, resume=True)
    found = Sensitivity.load(costs)
    found.model_copy(update={"notes": ["another"]}).save(costs)
    with pytest.raises(RequestError, match="planned with other sensitivities than those of"):
        run(recipe, small_folder, tmp_path / "out", sensitivity=costs, resume=True)
