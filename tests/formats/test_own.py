"""sinkquant's own format: exact after saving and loading, saved again, in shards; and never a random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import digest, quantized, weight_bytes
from families import tiny_model
from interruptions import killed
from safetensors import safe_open
from sinkmaps import sink_map_of
from small_runs import model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import sinkquant as sq
from sinkquant.artifacts import Plan, SinkMap, SuperWeight
from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to, save
from sinkquant.models import Decoder, load_tokenizer, open_model
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs.packed_linear import PackedLinear

CASES = [("llama", "gptq", 3, torch.bfloat16), ("phi3", "rtn", 2, torch.float16),
         ("gpt_neox", "gptaq", 5, torch.float32), ("gpt_oss", "rtn", 4, torch.bfloat16),
         ("gpt2", "gptq", 4, torch.bfloat16), ("gpt2", "rtn", 3, torch.float16)]


def map_of(decoder: Decoder) -> SinkMap:
    """Sinks in the first linear and in the last one that writes to the residual stream, which has a super weight."""
    free = [name for name, linear in decoder.shape("").linears.items() if not linear.fixed]
    last = SuperWeight(module=free[-1], row=1, column=2, value=3.0, loss_increase=0.4)
    return sink_map_of(decoder, {free[0]: 0.6, free[-1]: 0.3}, super_weights=(last,))


def split(text: Path, family: str, method: str, bits: int, dtype: torch.dtype,
          *more: str) -> tuple[PreTrainedModel, Plan]:
    model = tiny_model(family, dtype=dtype)
    decoder = Decoder.of(model)
    recipe = Recipe().replace([f"weights.method={method}", f"weights.bits={bits}", "weights.group_size=32",
                               "calibration.rows=4", "calibration.length=16", f"calibration.text={text}",
                               "protect.channels=split", "protect.max_share=0.5", *more])
    plan = make_plan(decoder.shape(family), map_of(decoder), recipe)
    return quantize(model, plan, tiny_tokenizer()), plan


@pytest.fixture(scope="module")
def saved(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, _ = split(text_file, "llama", "rtn", 4, torch.bfloat16)
    return model, save(model, tiny_tokenizer(), tmp_path_factory.mktemp("own") / "out")


@pytest.mark.parametrize(("family", "method", "bits", "dtype"), CASES)
def test_saved_loaded_and_saved_again_it_gives_the_same_logits(text_file: Path, tmp_path: Path, family: str,
                                                               method: str, bits: int, dtype: torch.dtype) -> None:
    model, plan = split(text_file, family, method, bits, dtype)
    assert plan.loads_in == ["sinkquant"]
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(out) == plan.weight_bytes
    packed = AutoModelForCausalLM.from_pretrained(out)
    names = {name for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert names == set(plan.formats)
    packed.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    source = open_model(out)
    rows = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(rows).logits
        for other in (packed, again, load(out)[0]):
            assert torch.equal(other(rows).logits, expected)
        with Decoder.of(source).present([source]):
            assert torch.equal(source(rows).logits, expected)
    for name in names:  # the dense weight can be looked at without being kept
        assert torch.equal(packed.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_plan_that_does_not_need_it_stays_plain(text_file: Path, tmp_path: Path) -> None:
    model = quantized(text_file)[0]
    config = json.loads((save(model, tiny_tokenizer(), tmp_path / "out") / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_transformers_that_does_not_know_it_refuses_it_and_runs_no_random_model(
        saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "sinkquant")  # as without `import sinkquant`
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_with_sinkquant_nothing_is_reported(saved: tuple[PreTrainedModel, Path],
                                            capfd: pytest.CaptureFixture[str]) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert not any(info.values())
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_what_was_loaded_is_not_quantized_twice(saved: tuple[PreTrainedModel, Path], text_file: Path) -> None:
    plan = split(text_file, "llama", "rtn", 4, torch.bfloat16)[1]
    for model in (load(saved[1])[0], open_model(saved[1])):
        with pytest.raises(RequestError, match="quantized already"):
            quantize(model, plan)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_disk_and_resumed_it_has_the_bytes_of_the_one_in_memory(text_file: Path, tmp_path: Path,
                                                                     family: str) -> None:
    source = model_folder(tmp_path / "source", family, torch.bfloat16)
    tokenizer = load_tokenizer(source)
    model, plan = split(text_file, family, "gptq", 3, torch.bfloat16)
    save(model, tokenizer, tmp_path / "memory")
    with killed(2):
        quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer)
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer)
    weights = [digest(tmp_path / place)["model.safetensors"] for place in ("memory", "disk")]
    assert weights[0] == weights[1]
    with safe_open(tmp_path / "disk" / "model.safetensors", framework="pt") as tensors:
        guards = [name for name in tensors.keys() if tensors.get_slice(name).get_shape() == [0]]  # noqa: SIM118
    assert len(guards) == 1


def test_a_run_on_conv1d_ends_with_a_report_and_says_what_loads_it(text_file: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source", "gpt2", torch.bfloat16)
    recipe = small_recipe(text_file, "evaluate.fidelity=false", "detect.super_weights=false", "weights.method=rtn")
    report = sq.run(recipe, source, tmp_path / "out")
    assert report is not None
    assert {row.name for row in report.rows} == {"unquantized", "sink_aware", "control"}
    assert Plan.load(tmp_path / "out" / "plan.json").loads_in == ["sinkquant"]
