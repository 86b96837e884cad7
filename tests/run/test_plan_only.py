"""--plan-only: headers and configuration are enough where a plan takes nothing from detection."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from small_runs import model_folder, small_recipe
from transformers import AutoConfig, AutoModelForCausalLM

import sinkquant as sq
from sinkquant.errors import RequestError
from sinkquant.models import shards
from sinkquant.policy import headers
from sinkquant.run import job, pipeline

LLAMA_70B = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192, "dtype": "bfloat16"}


def sparse_folder(folder: Path, files: int, **settings: Any) -> Path:
    """A checkpoint whose files have headers and the right sizes, and holes where the weights would be."""
    folder.mkdir()
    config = AutoConfig.for_model("llama", **settings)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tensors = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    weight_map = {}
    for index in range(files):
        header, end = {}, 0
        for name, shape in tensors[index::files]:
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = f"model-{index:05d}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{index:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight or detecting is a failure."""
    def never(*_: object, **__: object) -> None:
        raise AssertionError("more than headers was read")

    monkeypatch.setattr(shards.StoredTensor, "_read", never)
    monkeypatch.setattr(job, "detect", never)


def test_a_model_of_70_billion_parameters_is_planned_from_its_headers(tmp_path: Path, no_weights: None) -> None:
    folder = sparse_folder(tmp_path / "70b", 30, **LLAMA_70B)
    recipe = sq.Recipe.load("w4a16-sink").replace(["protect.tokens=false", "weights.group_size=128"])
    assert sq.run(recipe, folder, tmp_path / "out", plan_only=True) is None
    plan = sq.Plan.load(tmp_path / "out" / "plan.json")
    # 80 blocks of 855,638,016 weights at 4 bits with a 16-bit scale for 128; two tables of the vocabulary stay.
    linears = 80 * 855_638_016 * (4 + 16 / 128) / 8
    assert plan.weight_bytes == pytest.approx(linears + 2 * 2 * 128256 * 8192, rel=1e-3)
    assert plan.bits_per_weight == pytest.approx(4.125, abs=1e-3)
    assert plan.notes == ["the model folder has no tokenizer; carrying this plan out takes one"]
    assert "headers and configuration alone" in (tmp_path / "out" / "run.log").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "sinkmap.json").exists()


@pytest.mark.parametrize("changes", [
    ["protect.tokens=false"],
    ["weights.method=rtn", "protect.modules=[re:.*layers.0.*]"],
    ["protect.statistics=all"],
    ["protect.statistics=attention"],
    ["protect.tokens=false", "kv_cache.exact=first-n", "kv_cache.group_size=32", "weights.bits=3"],
], ids=str)
def test_the_plan_from_headers_is_the_plan_of_the_run(tmp_path: Path, text_file: Path, changes: list[str]) -> None:
    folder = model_folder(tmp_path / "model", "qwen3", head_dim=32)
    recipe = small_recipe(text_file, "evaluate.skip=true", *changes)
    shape = pipeline.Decoder.of(sq.load(folder)[0]).shape("model")
    early, asking = headers.plan_from_shapes(shape, recipe)
    assert asking == []
    assert early is not None
    sink_map = sq.detect(*sq.load(folder), recipe=recipe)
    late = pipeline.make_plan(shape, sink_map, recipe)
    # The selectors of sinks that no statistics look at are all that may differ.
    calibration = late.calibration.model_copy(update={"sinks": early.calibration.sinks})
    assert early.to_json() == late.model_copy(update={"calibration": calibration}).to_json()


@pytest.mark.parametrize(("changes", "named"), [
    ([], ["protect.tokens"]),
    (["protect.statistics=cap"], ["protect.tokens"]),
    (["weights.method=rtn", "protect.channels=module"], ["protect.channels"]),
    (["weights.method=rtn", "budget.bits=5"], ["budget"]),
    (["weights.method=rtn", "kv_cache.prefix=bos"], ["kv_cache.exact", "kv_cache.prefix"]),
    (["protect.tokens=false", "kv_cache_scheme={sinks: exclude}"], ["kv_cache_scheme.sinks"]),
], ids=str)
def test_recipes_that_take_something_from_detection_are_told_by_name(tmp_path: Path, tiny_folder: Path, text_file: Path,
                                                                     changes: list[str], named: list[str]) -> None:
    recipe = small_recipe(text_file, *changes)
    assert headers.plan_from_shapes(pipeline.Decoder.of(sq.load(tiny_folder)[0]).shape(""), recipe) == (None, named)
    sq.run(recipe, tiny_folder, tmp_path / "out", plan_only=True)
    assert (tmp_path / "out" / "sinkmap.json").is_file()
    log = (tmp_path / "out" / "run.log").read_text(encoding="utf-8")
    assert f"detects the sinks first, for {', '.join(named)}" in log


def test_with_a_saved_sink_map_no_weight_is_read_and_a_run_does_not_detect(
        tmp_path: Path, tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(text_file, "evaluate.skip=true")
    sq.run(recipe, tiny_folder, tmp_path / "whole")
    sink_map = sq.SinkMap.load(tmp_path / "whole" / "sinkmap.json")
    with monkeypatch.context() as patch:
        patch.setattr(shards.StoredTensor, "_read", None)
        sq.run(recipe, tiny_folder, tmp_path / "planned", plan_only=True, sink_map=sink_map)
    monkeypatch.setattr(job, "detect", None)
    sq.run(recipe, tiny_folder, tmp_path / "out", sink_map=sink_map)
    for name in ("plan.json", "sinkmap.json"):
        assert (tmp_path / "planned" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    foreign = sink_map.model_copy(update={"model": sink_map.model.model_copy(update={"layers": 5})})
    edited = sq.Plan.load(tmp_path / "out" / "plan.json")
    with pytest.raises(RequestError, match="the sink map is of another model"):
        sq.run(recipe, tiny_folder, tmp_path / "foreign", sink_map=foreign, edited=edited)


def test_a_plan_of_a_model_that_would_not_fit_is_made(tmp_path: Path, tiny_folder: Path, text_file: Path) -> None:
    tight = small_recipe(text_file, "compute.memory_limit=0.000001", "protect.tokens=false")
    sq.run(tight, tiny_folder, tmp_path / "out", plan_only=True)
    with pytest.raises(RequestError, match="GB of memory to detect"):
        sq.run(tight.replace(["protect.tokens=true"]), tiny_folder, tmp_path / "detected", plan_only=True)


def test_a_plan_brings_its_recipe(tmp_path: Path, tiny_folder: Path) -> None:
    """In Python as on the command line: the control and the evaluation are those of the recipe in the plan."""
    recipe = sq.Recipe.load("w3a16-sink").replace(["protect.tokens=false", "weights.group_size=32", "name=mine"])
    assert sq.run(recipe, tiny_folder, tmp_path / "first", plan_only=True) is None
    plan = sq.Plan.load(tmp_path / "first" / "plan.json")
    assert sq.run(edited=plan, model=tiny_folder, output=tmp_path / "second", plan_only=True) is None
    assert "recipe mine" in (tmp_path / "second" / "run.log").read_text(encoding="utf-8")
