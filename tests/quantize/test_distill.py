"""End-to-end tuning: it brings the model's predictions nearer, stays on the grid, and holds what is to be held."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.evaluate.divergence import compare_rows
from sinkquant.models import Decoder, read_text, token_rows
from sinkquant.policy import make_plan, require_distill
from sinkquant.quantize import PackedWeight, quantize, ranks, state_of
from sinkquant.quantize.refine import Scales
from sinkquant.recipe import Recipe

ROWS, LENGTH = 4, 32


def planned(model: PreTrainedModel, text: Path, iterations: int, *more: str) -> Plan:
    """A 2-bit plan of a tiny model with so many iterations; experts are left alone."""
    decoder = Decoder.of(model)
    recipe = Recipe().replace([
        f"calibration.text={text}", f"calibration.rows={ROWS}", f"calibration.length={LENGTH}", "weights.bits=2",
        "weights.group_size=32", "weights.method=rtn", f"weights.distill={iterations}"])
    if decoder.experts or "expert" in str(decoder.model):
        recipe = recipe.replace(["weights.ignore=['*experts*']"])
    return make_plan(decoder.shape(""), sink_map_of(decoder), recipe.replace(more))


def divergence(family: str, model: PreTrainedModel, text: Path, **overrides: Any) -> float:
    """From the unquantized bfloat16 model, on the calibration rows, computed in float32."""
    rows = token_rows(tiny_tokenizer(), read_text(str(text), "calibration"), ROWS, LENGTH)
    found = compare_rows(tiny_model(family, dtype=torch.bfloat16, **overrides).float(),
                         copy.deepcopy(model).float(), rows).kl
    return sum(found) / len(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_nearer_and_loads_as_it_was(family: str, text_file: Path, tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    with caplog.at_level("INFO", "sinkquant"):
        quantize(model, planned(model, text_file, 12, "weights.distill_codes=true"), tiny_tokenizer())
    first, last = map(float, re.findall(r"\d\.\d+", caplog.messages[-1]))
    assert last < 0.9 * first
    assert divergence(family, model, text_file) == pytest.approx(last, rel=0.03, abs=1e-5)
    for packed in state_of(model).weights.values():
        assert isinstance(packed, PackedWeight)
        assert packed.codes.min() >= -2
        assert packed.codes.max() <= 1
        assert packed.scale.dtype == torch.bfloat16
    sq.save(model, tiny_tokenizer(), tmp_path / "saved")  # which compares logits after loading, bit by bit
    if family in ("llama", "opt"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        row = torch.arange(8, 40)[None]
        with torch.no_grad():
            assert torch.equal(again(row).logits, model(row).logits)


@pytest.mark.parametrize("more", [["weights.lm_head=2"], ["weights.lm_head=8", "weights.embeddings=8"]])
def test_it_learns_from_the_unquantized_head(more: list[str], text_file: Path,
                                             caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings="weights.embeddings=8" in more)
    with caplog.at_level("INFO", "sinkquant"):
        quantize(model, planned(model, text_file, 2, "weights.bits=4", *more), tiny_tokenizer())
    last = float(re.findall(r"\d\.\d+", caplog.messages[-1])[-1])
    tied = model.config.tie_word_embeddings
    assert divergence("llama", model, text_file, tie_word_embeddings=tied) == pytest.approx(last, rel=0.03, abs=1e-5)


@pytest.mark.parametrize("more", [
    ["weights.rotate=values", "weights.smooth=smoothquant", "weights.tune=2", "activations.format=int8"],
    ["weights.method=gptq", "prune.method=wanda", "prune.pattern=2:4"], ["backend=gptq"]])
def test_it_comes_last_in_whatever_a_recipe_composes(more: list[str], text_file: Path, tmp_path: Path) -> None:
    plain, better = (tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2) for _ in range(2))
    for model, iterations in ((plain, 0), (better, 24)):
        quantize(model, planned(model, text_file, iterations, "weights.distill_codes=true", *more), tiny_tokenizer())
    before, after = (divergence("llama", model, text_file, num_hidden_layers=2) for model in (plain, better))
    assert after < before
    sq.save(better, tiny_tokenizer(), tmp_path / "saved")
    for name, packed in state_of(better).weights.items():
        before = state_of(plain).weights[name]
        assert isinstance(packed, PackedWeight)
        assert isinstance(before, PackedWeight)
        assert (packed.codes != before.codes).any()
        if "prune.method=wanda" in more:
            assert (packed.codes.unflatten(1, (-1, 4)) == 0).sum(-1).min() >= 2


@pytest.mark.parametrize("more", [["weights.tune=2"], ["weights.bits=4", "protect.channels=split"]])
def test_scales_alone_are_tuned_and_codes_stay(more: list[str], text_file: Path, tmp_path: Path) -> None:
    plain, better = (tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2) for _ in range(2))
    for model, iterations in ((plain, 0), (better, 24)):
        quantize(model, planned(model, text_file, iterations, "weights.method=gptq", *more), tiny_tokenizer())
    before, after = (divergence("llama", model, text_file, num_hidden_layers=2) for model in (plain, better))
    assert after < 0.9 * before
    for name, packed in state_of(better).weights.items():
        known = state_of(plain).weights[name]
        assert torch.equal(packed.codes, known.codes)
        assert not torch.equal(packed.scale, known.scale)
    folder = sq.save(better, tiny_tokenizer(), tmp_path / "saved")
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(sq.load(folder)[0](row).logits, better(row).logits)


def test_four_bit_floats_under_rounded_inputs_come_nearer(text_file: Path, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2)
    with torch.no_grad():
        for linear in Decoder.of(model).linears.values():
            linear.weight[:, ::16] *= 24  # which leaves few numbers to the rest of a block: there is something to gain
    asked = ["weights.method=gptq", "weights.tune=2", "weights.format=nvfp4", "weights.bits=4", "weights.group_size=16",
             "activations.format=nvfp4", "activations.scale=group"]
    with pytest.raises(RequestError, match=r"too coarse to be tuned alone; set weights\.distill_codes=true"):
        planned(model, text_file, 24, *asked)
    with caplog.at_level("INFO", "sinkquant"):
        quantize(model, planned(model, text_file, 24, *asked, "weights.distill_codes=true"), tiny_tokenizer())
    first, last = map(float, re.findall(r"\d\.\d+", caplog.messages[-1]))
    assert last < 0.9 * first
    folder = sq.save(model, tiny_tokenizer(), tmp_path / "saved")
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(row).logits, model(row).logits)


def test_two_runs_give_the_same_codes_and_another_seed_others(text_file: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", num_hidden_layers=1)
        plan = planned(model, text_file, 9, f"seed={seed}", "calibration.rows=8")
        found.append(state_of(quantize(model, plan, tiny_tokenizer())).weights)
    same = [all(torch.equal(found[0][name].dequantized(), other[name].dequantized()) for name in other)
            for other in found[1:]]
    assert same == [True, False]


def test_what_does_not_help_is_not_kept(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Scales.__module__], "RATE", -0.02)  # uphill
    plain, worse = (tiny_model("llama", num_hidden_layers=1) for _ in range(2))
    for model, iterations in ((plain, 0), (worse, 2)):
        quantize(model, planned(model, text_file, iterations, "weights.method=gptq"), tiny_tokenizer())
    for name, weight in plain.state_dict().items():
        assert torch.equal(worse.state_dict()[name], weight)


@pytest.mark.parametrize(("family", "more", "sentence"), [
    ("qwen3_moe", ["weights.ignore=[]"], r"weights\.distill does not reach packed experts; set weights\.distill=0"),
    ("llama", ["activations.format=fp8", "weights.bits=8", "weights.group_size=-1"], "FP8 weights are not tuned"),
    ("llama", ["backend=quanto", "weights.bits=8", "weights.group_size=-1"], r"quanto rounds weights by itself"),
    ("llama", ["activations.format=int8", "weights.bits=8", "kv_cache.prefix=bos", "kv_cache.group_size=32"],
     "does not let the tokens of an exact prefix through")])
def test_what_it_cannot_do_is_refused_in_the_plan(family: str, more: list[str], sentence: str,
                                                  text_file: Path) -> None:
    model = tiny_model(family)
    with pytest.raises(RequestError, match=sentence):
        planned(model, text_file, 5, *more)
    shape = Decoder.of(model).shape("")
    recipe = Recipe().replace(["weights.distill=5", "weights.method=rtn", *more])
    with pytest.raises(RequestError, match=sentence):  # and before the sinks are looked for
        require_distill(shape, recipe)


def test_several_processes_are_refused(tiny: PreTrainedModel, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "this_rank", lambda: (0, 2))
    with pytest.raises(RequestError, match=r"weights\.distill.* start without torchrun"):
        ranks.my_rows(torch.zeros(8, 4), planned(tiny, text_file, 5))
