"""What no sink map could make possible is refused from shapes and recipe alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from small_runs import model_folder, small_recipe

import sinkquant as sq
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import require_plannable
from sinkquant.recipe import Recipe, recipe_names
from sinkquant.run import job

SPLIT = "protect.channels=split"
EIGHT = ("weights.bits=8", "weights.group_size=-1")
QUANTO = ("backend=quanto", "weights.method=rtn", *EIGHT)


def refuse(family: str, *assignments: str) -> None:
    recipe = Recipe().replace(["weights.group_size=32", *assignments])
    require_plannable(Decoder.of(tiny_model(family)).shape("tiny"), recipe)


@pytest.mark.parametrize(("family", "assignments", "message"), [
    ("llama", (SPLIT, "prune.method=wanda"), "choose one of the two"),
    ("llama", (SPLIT, "prune.heads=no-op"), "choose one of the two"),
    ("llama", (SPLIT, "weights.rotate=values"), "choose one of the two"),
    ("llama", (SPLIT, "activations.format=int8"), "leave the section activations out"),
    ("llama", (SPLIT, *QUANTO, "protect.bits=16"), "leave backend at compressed-tensors"),
    ("mixtral", (SPLIT,), "holds no packed experts"),
    ("mixtral", ("weights.tune=5",), "experts"),
    ("gpt2", ("activations.format=int8",), "leave the section activations out"),
    ("gpt2", QUANTO, "no other backend holds"),
    ("llama", ("activations.format=fp8",), "set weights.bits=8"),
    ("llama", ("activations.format=int8", "activations.scale=tensor", "activations.sinks=exclude"), "kv_cache.prefix"),
    ("llama", ("protect.statistics=exclude",), "kv_cache.prefix=bos"),
    ("llama", ("weights.group_size=48",), "does not divide"),
    ("llama", ("budget.bits=2.5",), "take 4.525 bits per weight"), ("llama", ("budget.bytes=1000",), "not feasible"),
    ("llama", ("budget.bits=2.1", "budget.solver=sensitivity"), "candidates .* take 2.525 bits per weight"),
    ("llama", ("budget.bytes=1000", "budget.context=64"), "smallest candidates .* 24,576 of the KV cache"),
    ("llama", ("budget.bytes=1000", "budget.context=1024", "kv_cache={}"), "of the KV cache; raise .* to more than"),
    ("llama", ("budget.bytes=300000", "budget.context=100000"), "38,400,000 of the KV cache; .* to 38,509,672"),
    ("llama", ("budget.bits=5", "budget.solver=sensitivity", "sensitivity.group_sizes=[48]"), r"group size of \[48\]"),
    ("llama", ("budget.bits=3.5", "engine=vllm-cpu"), "take 4.525 .* another engine, or fewer bits .* vllm-cpu loads"),
    ("llama", ("budget.loss=0.1", "engine=llama.cpp"), "engine llama.cpp loads no candidate format"),
    ("llama", ("budget.bits=6", "budget.engine=vllm", "weights.overrides=[{pattern: '*.o_proj', bits: 3}]"),
     "engine vllm does not load .*o_proj in 3 bits"),
    ("llama", ("budget.bits=6", "budget.engine=vllm", "weights.lm_head=8", "weights.embeddings=8"),
     "engine vllm does not load model.embed_tokens"),
    ("llama", ("budget.bits=5", "engine=vllm-cuda", "kv_cache={}"), "keeps its KV cache in 16 bits"),
    ("llama", ("engine=vllm-cpu", "activations={format: int8, bits: 10}", *EIGHT), "with inputs in int8 alone"),
    ("llama", ("budget={bits: 12, engine: vllm-cpu}", "sensitivity.bits=[8]", "activations={format: int8, bits: 12}",
               *EIGHT), "vllm-cpu runs .* with inputs in int8 alone"),
    ("llama", ("activations={format: int8, bits: 7}", *EIGHT), "take 8 bits at least"),
    ("llama", ("kv_cache={exact: massive}", "weights.rotate=full"), "spreads over all"),
    ("llama", ("weights.ignore=['*.qq_proj']",), "weights.ignore")])
def test_combinations_that_cannot_be_are_refused_in_one_sentence(family: str, assignments: tuple[str, ...],
                                                                 message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        refuse(family, *assignments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "assignments"), [
    ("llama", (SPLIT, "weights.smooth=awq", "weights.tune=3", "weights.method=gptaq")),
    ("llama", ("protect.statistics=exclude", "kv_cache={prefix: bos}")),
    ("llama", ("kv_cache={exact: massive}", "weights.ignore=['*']")),
    ("llama", ("prune.heads=no-op", "prune.method=wanda", "weights.rotate=full")),
    ("llama", ("budget.bits=5", "budget.solver=sensitivity")), ("llama", ("budget.bits=5",)),
    ("llama", ("budget.bits=4.53", "engine=vllm-cpu")),
    ("llama", ("budget.bytes=150000", "budget.context=512", "sensitivity.kv_bits=[1]", "kv_cache={window: 32}")),
    ("llama", ("budget.bits=2.53", "budget.solver=sensitivity")), ("llama", ("budget.loss=0.001",)),
    ("mixtral", ("budget.bits=2.97", "budget.solver=sensitivity", "weights.method=rtn")),
    ("mixtral", (SPLIT, "weights.ignore=['*.experts.*']")), ("gpt2", (SPLIT,))])
def test_what_may_be_possible_is_left_to_detection(family: str, assignments: tuple[str, ...]) -> None:
    refuse(family, *assignments)


def test_every_packaged_recipe_fits_a_plain_model() -> None:
    shape = Decoder.of(tiny_model("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512,
                                  head_dim=64)).shape("tiny")
    for name in recipe_names():
        recipe = Recipe.load(name)
        if recipe.backend == "gguf":  # its file holds what stands in the model's folder
            with pytest.raises(RequestError, match="made in memory"):
                require_plannable(shape, recipe)
        else:
            require_plannable(shape, recipe)


def test_a_run_refuses_before_it_detects(tmp_path: Path, tiny_folder: Path, text_file: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "detect", None)
    with pytest.raises(RequestError, match="leave the section activations out"):
        sq.run(small_recipe(text_file, SPLIT, "activations.format=int8"), tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_sinks_of_a_model_without_rotary_positions_are_not_moved(tmp_path: Path, text_file: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "detect", None)
    folder = model_folder(tmp_path / "model", "gpt2")
    with pytest.raises(RequestError, match="rotary positions, which GPT2LMHeadModel does not"):
        sq.run(small_recipe(text_file, "kv_cache.evict=128"), folder, tmp_path / "out")


def test_a_budget_of_inputs_bits_is_left_to_sensitivities() -> None:
    """What it will choose takes them; that something is to be chosen at all does not."""
    shape = Decoder.of(tiny_model("llama", dtype=torch.bfloat16, hidden_size=128)).shape("tiny")
    recipe = Recipe.load("mxfp4-sink").replace(["activations.bits=7"])
    require_plannable(shape, recipe.replace(["weights.smooth=none"]))
    with pytest.raises(RequestError, match="smooth"):
        require_plannable(shape, recipe)


def test_sinks_beyond_sliding_windows_are_left_to_detection() -> None:
    sliding = "kv_cache={exact: EXACT, prefix: PREFIX, max_exact: 4, sliding_sinks: true}"
    for exact, prefix in (("detected", "none"), ("first-n", "none"), ("none", "bos"), ("detected", "found")):
        refuse("gemma3_text", sliding.replace("EXACT", exact).replace("PREFIX", prefix))
    for family, exact, message in (("gemma3_text", "none", "the cache keeps none"), ("llama", "detected", "has a slid"),
                                   ("gemma3_text", "massive", "known before a pass")):
        with pytest.raises(RequestError, match=message):
            refuse(family, sliding.replace("EXACT", exact).replace("PREFIX", "none"))


def test_heads_alone_may_be_what_a_recipe_works_on() -> None:
    refuse("llama", "weights.ignore=['*']", "kv_cache=null", "prune.heads=no-op")
