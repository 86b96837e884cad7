"""What a run will take is known before it begins, and one that will not fit is refused with what would make it fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from families import tiny_mixture, tiny_model
from small_runs import fingerprint, model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import sinkquant as sq
from sinkquant.costs import Pace, Rate, Sizes
from sinkquant.detect.roles import TOKENS as ROLE_TOKENS
from sinkquant.detect.survey import batch_rows
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, open_model
from sinkquant.predict import SENSITIVITIES, predict, require_memory, spill_limit
from sinkquant.predict.pace import _weights_of_a_token, measure
from sinkquant.predict.predict import stage_seconds
from sinkquant.quantize import costs
from sinkquant.run import job


@pytest.fixture(scope="module")
def large() -> Decoder:
    """A 1.2-billion-parameter Llama on the meta device: shapes only."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        return Decoder.of(AutoModelForCausalLM.from_config(config))


def test_a_run_that_does_not_fit_is_refused_with_settings_that_make_it_fit(large: Decoder) -> None:
    recipe = sq.Recipe().replace(["compute.memory_limit=2.5", "calibration.rows=32"])
    sentence = r"needs [\d.]+ GB of memory to evaluate, and compute.memory_limit is 2.5 GB; --set .* makes it fit"
    with pytest.raises(RequestError, match=sentence) as refused:
        require_memory(large, recipe)
    settings = re.findall(r"--set (\S+)", str(refused.value))
    assert require_memory(large, recipe.replace(settings)).peak <= 2.5e9
    for setting in settings:  # none of them is for nothing
        fewer = [other for other in settings if other != setting]
        assert predict(large, recipe.replace(fewer)).peak > 2.5e9


def test_where_nothing_helps_the_least_is_named(large: Decoder) -> None:
    with pytest.raises(RequestError, match=r"no setting makes it fit; 0\.\d GB are the least"):
        require_memory(large, sq.Recipe().replace(["compute.memory_limit=0.05"]))


def test_what_costs_more_is_predicted_to_cost_more(large: Decoder) -> None:
    least = sq.Recipe().replace(["evaluate.skip=true", "weights.method=rtn", "weights.scale_search=false"])
    base = predict(large, least)
    assert predict(large, least.replace(["weights.method=gptq"])).peak_bytes["quantize"] > 1e9
    assert predict(large, least.replace(["detect.rows=1000"])).peak_bytes["detect"] > base.peak_bytes["detect"]
    assert base.peak_bytes.keys() == {"detect", "quantize"}
    assert predict(large, least.replace(["weights.tune=5"])).peak_bytes["quantize"] > 1e9
    alone = ["weights.method=gptq", "weights.ignore=['*']", "kv_cache={}"]
    assert predict(large, least.replace(alone)).peak_bytes["quantize"] == base.peak_bytes["quantize"]
    whole = predict(large, least.replace(["weights.distill=100"]))  # the whole model is in memory, with its gradient
    assert whole.peak_bytes["distill"] > 10 * large.model.num_parameters()
    scales = predict(large, least.replace(["kv_cache=null", "kv_cache_scheme={}"])).peak_bytes["quantize"]
    assert scales > 3 * 4 * 2048 * least.calibration.rows * least.calibration.length > base.peak_bytes["quantize"]
    with pytest.raises(RequestError, match=r"to distill, and .* 6.0 GB; --set weights.distill=0 makes it fit"):
        require_memory(large, least.replace(["weights.distill=100", "compute.memory_limit=6"]))


def test_sensitivities_are_a_stage_of_their_own_where_they_are_looked_for(large: Decoder) -> None:
    least = sq.Recipe().replace(["evaluate.skip=true", "detect.rows=1", "weights.method=rtn"])
    assert SENSITIVITIES not in predict(large, least).peak_bytes
    solved = least.replace(["budget.bits=3.5", "budget.solver=sensitivity"])
    assert SENSITIVITIES not in predict(large, solved, False).peak_bytes  # they are in a file
    found = predict(large, solved).peak_bytes[SENSITIVITIES]
    assert found == predict(large, least, True).peak_bytes[SENSITIVITIES]
    tokens, blocks, hidden = 64 * 128, 16, 2048
    assert found > 4 * tokens * (blocks + 1) * hidden  # what comes into every block waits for the way back
    for more in ("sensitivity.rows=128", "sensitivity.batch_size=32", "weights.method=gptq",
                 "sensitivity.measure_rows=4"):
        assert predict(large, solved.replace([more])).peak_bytes[SENSITIVITIES] > found, more
    tight = solved.replace(["compute.memory_limit=4"])
    with pytest.raises(RequestError, match=r"to find sensitivities, and .* 4.0 GB; --set .*sensitivity.rows=16") as no:
        require_memory(large, tight)
    settings = re.findall(r"--set (\S+)", str(no.value))
    require_memory(large, tight.replace(settings))
    require_memory(large, tight, ("detect",))


def test_those_of_the_cache_alone_are_charged_for_no_weights(large: Decoder) -> None:
    alone = sq.Recipe().replace(["evaluate.skip=true", "detect.rows=1", "kv_cache.bits=3"])

    def needed(*more: str) -> float:
        return predict(large, alone.replace(list(more))).peak_bytes[SENSITIVITIES]

    found = needed()
    for one in ("sensitivity.rows=512", "weights.method=rtn", "sensitivity.end_bits=[8]"):
        assert needed(one) == found, one
    assert needed("activations.bits=8", "activations.format=fp8", "sensitivity.rows=512") > found
    short = ("sensitivity.kv_length=64", "kv_cache.rotate=covariance")
    assert needed(*short, "calibration.length=2048") > needed(*short, "calibration.length=64")
    assert needed("sensitivity.measure_rows=1") > 4 * 128256 * 3 * 2048
    with pytest.raises(RequestError, match=r"to find sensitivities, .* --set .*sensitivity.kv_length=512 makes it fit"):
        require_memory(large, alone.replace([f"compute.memory_limit={found / 1e9 - 0.5}"]), (SENSITIVITIES,))


def test_time_is_counted_work_at_the_pace_of_the_machine(large: Decoder) -> None:
    pace = Pace(operation=2e-11, value=1e-9, scored=5e-9, watched=(Rate(1e-2, 1e-4), Rate(2e-2, 2e-4)),
                plain=5e-5, column=1e-3, column_row=1e-6, rounded=3e-7, kept=1e-8)

    def seconds(*assignments: str) -> dict[str, float]:
        recipe = sq.Recipe().replace(["detect.super_weights=false", *assignments])
        return stage_seconds(Sizes(large, recipe, 1e12), pace, tiny_tokenizer())

    rtn = seconds("weights.method=rtn", "evaluate.skip=true")
    reading = 16 * 60_821_504 * 2 / 1e9
    block = (2 * 100 + 20) * 64 * 1e-4 + 3 * 1e-2 + 8 * 512 * 2e-4 + 2e-2
    roles = 16 * ROLE_TOKENS * 5e-5 + reading
    assert rtn == {"detect": pytest.approx(16 * block + reading + roles),
                   "quantize sink_aware": pytest.approx(16 * 60_821_504 * 3.1e-7 + 2 * reading)}
    bare = seconds("weights.method=rtn", "evaluate.skip=true", "calibration.bos=never")  # nothing is read without <bos>
    assert rtn["detect"] - bare["detect"] == pytest.approx(16 * (100 * 64 * 1e-4 + 1e-2))
    ablated = seconds("weights.method=rtn", "evaluate.skip=true", "detect.super_weights=true")
    scored = 128256 * (2 * 2048 * 2e-11 + 5e-9)
    trials = sum(rows * 64 * (16 * (1 + 2 / 3 * tried) * 5e-5 + (1 + tried) * scored) + reading
                 for rows, tried in ((2, 18), (8, 9)))
    assert ablated["detect"] - rtn["detect"] == pytest.approx(trials)
    scales = seconds("weights.method=rtn", "evaluate.skip=true", "kv_cache=null", "kv_cache_scheme={}",
                     "calibration.rows=8", "calibration.length=64")
    assert scales["quantize sink_aware"] - rtn["quantize sink_aware"] == pytest.approx(8 * 64 * 16 * 5e-5)
    gptq = seconds("evaluate.skip=true")
    assert gptq["quantize sink_aware"] > 2 * rtn["quantize sink_aware"]
    assert seconds("evaluate.skip=true", "weights.distill=100")["quantize sink_aware"] > gptq["quantize sink_aware"]
    whole = seconds()
    assert list(whole) == ["detect", "quantize sink_aware", "detect sink_aware", "quantize control", "detect control",
                           "evaluate"]
    for setting in ("evaluate.limit=6", "evaluate.control=false", "evaluate.tasks=[sink_cloze]"):
        assert 0 < seconds(setting)["evaluate"] < 0.8 * whole["evaluate"]


def test_the_pace_is_measured_with_the_first_block(tmp_path: Path) -> None:
    decoder = Decoder.of(open_model(model_folder(tmp_path / "model")))
    for calibrated in (True, False):
        found = measure(decoder, sq.Recipe().replace(["detect.long_length=64", "weights.descent=0",
                                                       "weights.group_size=48"]), calibrated)
        positive = {found.operation, found.value, found.scored, *(rate.of(64) for rate in found.watched), found.plain,
                    found.kept}
        assert min(positive) > 0
        assert (found.column_row + found.column > 0) == calibrated
        assert (found.rounded > 0) == (not calibrated)


def test_experts_that_stay_on_disk_are_not_counted_with_their_block(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_mixture("deepseek_v3", moe_intermediate_size=256).save_pretrained(tmp_path / "model")
    decoder = Decoder.of(open_model(tmp_path / "model"))
    monkeypatch.setattr(costs, "RELOADED", 0)
    monkeypatch.setattr(costs, "WAITING", 1)

    def peaks(*more: str) -> dict[str, float]:
        # States go to the disk or are few, so that weights are what counts.
        return predict(decoder, sq.Recipe().replace(["evaluate.skip=true", "compute.memory_limit=1e-9", "detect.rows=1",
                                                     "detect.length=32", "detect.long_rows=0", *more])).peak_bytes

    whole, compared = peaks(), peaks("weights.method=gptaq")
    monkeypatch.setattr("sinkquant.models.on_disk.LARGE", 0)
    experts, one = 16 * 3 * 256 * 64, 3 * 256 * 64
    # Weights in float32 as they are stored and as they compute, and a byte for every code that waits to be written.
    assert whole["quantize"] - peaks()["quantize"] == pytest.approx((4 + 4 + 1) * experts - one, rel=0.05)
    assert peaks("weights.method=gptaq")["quantize"] == compared["quantize"]  # which holds whole blocks
    assert peaks()["detect"] < whole["detect"]
    assert peaks("weights.method=rtn")["quantize"] < peaks()["quantize"]


def test_a_token_of_a_mixture_takes_the_experts_that_it_is_sent_to(tmp_path: Path) -> None:
    model = tiny_mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    decoder = Decoder.of(open_model(tmp_path / "model"))
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    assert _weights_of_a_token(decoder) == block - 16 * 3 * 32 * 64 + 2 * 3 * 32 * 64
    assert _weights_of_a_token(Decoder.of(tiny_model("llama"))) == sum(
        parameter.numel() for parameter in tiny_model("llama").model.layers[0].parameters())
    found = measure(decoder, sq.Recipe().replace(["detect.long_length=64", "weights.group_size=32",
                                                  "weights.descent=0"]), True)
    assert found.plain > 0
    assert all(rate.token > 0 and rate.fixed > 0 for rate in found.watched)  # a few tokens ask for all experts


def test_experts_that_cannot_be_told_apart_are_no_wider_than_one_of_them() -> None:
    few, many = (Sizes(Decoder.of(tiny_model("gpt_oss", num_local_experts=count)), sq.Recipe(), 1e12)
                 for count in (4, 64))
    assert few.widest == many.widest == 2 * 128  # gate and up
    assert few.largest == many.largest == 64 * 64  # they stay as they are


def test_wide_models_walk_with_fewer_rows_at_a_time(large: Decoder) -> None:
    recipe = sq.Recipe().replace(["compute.device=cpu"])
    assert batch_rows(large, recipe, 64) == 8  # 512 tokens of 8192 values each are 16 MB
    assert batch_rows(large, recipe, 4096) == 1
    assert batch_rows(Decoder.of(tiny_model("llama")), recipe, 64) == recipe.detect.batch_size


def test_hidden_states_leave_memory_at_an_eighth_of_what_is_allowed() -> None:
    assert spill_limit(sq.Recipe().replace(["compute.memory_limit=8"])) == 10**9


def test_a_run_that_ends_with_its_checkpoint(tmp_path: Path, text_file: Path) -> None:
    model = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.method=rtn", "evaluate.tasks=[no_such_task]")
    assert sq.run(recipe, model, tmp_path / "out") is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model", "plan.json", "run.log", "sinkmap.json"}
    log = (tmp_path / "out" / "run.log").read_text(encoding="utf-8")
    assert "GB of memory" in log
    assert re.search(r"block 2 of 3: self_attn.q_proj 0\.\d+", log)  # every module with the error it was left with
    solved = recipe.replace(["budget.bits=4", "budget.solver=sensitivity", "weights.rotate=values"])
    with pytest.raises(RequestError, match="changes the weights that sensitivities are taken of"):
        sq.run(solved, model, tmp_path / "solved")  # before the sinks are looked for
    tight = recipe.replace(["compute.memory_limit=0.000001"])
    with pytest.raises(RequestError, match=r"compute.memory_limit is 0.0 GB"):
        sq.run(tight, model, tmp_path / "tight")
    assert not (tmp_path / "tight").exists()
    assert not (tmp_path / "tight.partial").exists()


def test_a_run_with_mapped_hidden_states_gives_the_same_bytes(
        tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, "evaluate.skip=true")
    sq.run(recipe, model, tmp_path / "ram")
    monkeypatch.setattr(job, "spill_limit", lambda _: 0)
    sq.run(recipe, model, tmp_path / "disk")
    assert fingerprint(tmp_path / "ram" / "model") == fingerprint(tmp_path / "disk" / "model")
