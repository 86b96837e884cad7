"""Advice from a model folder on the command line: protections carried out beside their controls, and refusals."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from commands import call, one_sentence
from sinkmaps import sink_map_of
from small_runs import SMALL, model_folder
from tiny_tokenizer import random_text

from sinkquant.artifacts.advice import Advice
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, open_model

FAST = [*SMALL, "weights.descent=0", "weights.scale_search=false", "sensitivity.rows=2", "kv_cache={window: 0}",
        "weights.bits=3", "detect.super_weights=false"]
ONLY = ["--only", "boosted statistics", "--only", "exact tokens"]


@pytest.fixture
def known(tiny, tiny_folder, tmp_path):
    """The path of a sink map of `tiny`."""
    return sink_map_of(Decoder.of(tiny), name=str(tiny_folder)).save(tmp_path / "sinkmap.json")


def options(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


def test_predicted_and_measured(known, tiny_folder, text_file, tmp_path):
    done = call("advise", tiny_folder, "--sink-map", known, "--text", text_file, "--measure", "--json", *ONLY, "-o",
                tmp_path / "advice.json", *options(*FAST, f"evaluate.text={text_file}"))
    assert done.code == 0, done.err
    found = Advice.parse(json.loads(done.out), "stdout")
    assert found == Advice.load(tmp_path / "advice.json")
    assert found.sinks == ["<s>"]
    (note,) = found.notes  # random tokens of a tiny model: the ends are much of it
    assert note.startswith("the token embedding and the output head in 8 bits")
    assert "w5-file-budget" in note
    weights, cache = found.mechanisms
    assert (weights.name, cache.name) == ("boosted statistics", "exact tokens")
    assert weights.predicted.control > 0
    assert not weights.predicted.at_best
    assert min(cache.predicted.control, cache.predicted.aware) > 0
    assert cache.predicted.control != cache.predicted.aware
    for one in (weights, cache):
        worth = one.measured
        assert worth.gain == pytest.approx(worth.control - worth.aware)
        assert worth.control > 0
        assert worth.low <= worth.gain <= worth.high
        assert one.answer == ("pays" if worth.low > 0 else "does not pay" if worth.high < 0 else "nothing here")


def test_not_measured_without_being_asked(known, tiny_folder, text_file):
    shown = call("advise", tiny_folder, "--sink-map", known, "--text", text_file, "--only", "exact tokens",
                 "--only", "split columns", *options(*FAST))
    assert shown.code == 0, shown.err
    assert "exact tokens (KV cache): Not measured; predicted " in shown.out
    assert "split columns (weights): Nothing here: no linear has a range that sinks set" in shown.out
    assert "The sinks are '<s>'." in shown.out


def test_fp4_is_advised_about_what_weighs_tokens_and_sets_ranges(text_file, tmp_path):
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    known = sink_map_of(Decoder.of(open_model(folder)), {"model.layers.1.mlp.down_proj": 0.6},
                        name=str(folder)).save(tmp_path / "sinkmap.json")
    done = call("advise", folder, "-r", "nvfp4-sink", "--sink-map", known, "--text", text_file, "--measure", "--json",
                "--only", "boosted statistics", "--only", "static ranges without the sinks", "--only", "split columns",
                *options(*SMALL, f"evaluate.text={text_file}", "weights.group_size=16", "weights.descent=0"))
    assert done.code == 0, done.err
    split, weights, ranges = Advice.parse(json.loads(done.out), "stdout").mechanisms
    assert (split.answer, split.sentence.partition(":")[0]) == ("not possible", "Not possible")
    assert "nothing stands beside NVFP4 weights" in split.sentence
    assert (weights.name, ranges.name) == ("boosted statistics", "static ranges without the sinks")
    assert ranges.settings == ["activations.sinks=16-bit"]  # blocks have scales per token already
    assert weights.measured.aware != weights.measured.control == ranges.measured.control
    shown = call("advise", folder, "-r", "mxfp4-sink", "--sink-map", known, "--text", text_file,
                 *options(*SMALL, "weights.group_size=32", "weights.smooth=none"))
    assert shown.code == 0, shown.err
    assert "static ranges" not in shown.out  # nothing is stored for MXFP4
    assert "no loss of the weights is predicted: there are no sensitivities of floating-point weights" in " ".join(
        shown.out.split())
    refused = call("advise", folder, "-r", "mxfp4-sink", *options("activations.bits=6"))
    assert (refused.code, "leave it out to be advised" in one_sentence(refused)) == (2, True)


def test_no_op_heads_are_left_to_detection(tiny_folder, text_file, monkeypatch):
    """Nothing is known of heads before."""
    def found(*_, **__):
        raise RequestError("detection is reached.")

    monkeypatch.setattr(importlib.import_module("sinkquant.advise.advise"), "detect", found)
    outcome = call("advise", tiny_folder, "--text", text_file, *options(*FAST, "prune.heads=no-op"))
    assert "detection is reached" in one_sentence(outcome)


def test_wrong_requests_are_refused_before_anything_is_computed(known, tiny_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(random_text(120), encoding="utf-8")
    for arguments, words in ((["--set", "budget.loss=4"], "leave the budget out"),
                             (["--set", "weights.group_size=48"], "does not divide"),
                             (["--only", "split column"], "did you mean 'split columns'"),
                             (["--measure", *options(f"evaluate.text={short}", "evaluate.divergence_length=80",
                                                     *SMALL[:1])], "holds but one row")):
        outcome = call("advise", tiny_folder, *arguments)
        assert outcome.code == 2, outcome.out
        assert words in one_sentence(outcome)
