"""Residual sinks: channels in which most tokens are large, told apart from what few tokens carry."""

from __future__ import annotations

from pathlib import Path

import pytest
from detect_helpers import small_recipe, tokens, write_text
from families import tiny_model
from planter import CONSTANT, Plant, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts.findings import further
from sinkquant.detect import detect

CHANNEL, TIMES = 33, 12.0
SMALL = ["detect.super_weights=false"]


def with_large_channel(model: PreTrainedModel) -> PreTrainedModel:
    """Every token large in one channel from the embedding on: 12 times its median channel."""
    embedding = model.get_input_embeddings().weight.data
    embedding[:, CHANNEL] = TIMES * embedding.abs().median(dim=1).values
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_channel_that_is_large_for_every_token_is_one_and_no_sink(tmp_path: Path, family: str) -> None:
    found = detect(with_large_channel(tiny_model(family)), tiny_tokenizer(), write_text(tmp_path), small_recipe(*SMALL))
    assert [one.channel for one in found.residual_sinks] == [CHANNEL]
    (sink,) = found.residual_sinks
    assert sink.largest_ratio == pytest.approx(TIMES, rel=0.1)
    assert sink.null < 5 < sink.ratio
    assert any(line.startswith("1 residual sink, a channel") for line in further(found, None))
    assert found.channels == []
    assert found.tokens == []
    assert found.emergence is None
    assert found.verdict is not None
    assert not found.verdict.sinks


def test_a_massive_activation_of_few_tokens_is_none_beside_one(tmp_path: Path) -> None:
    model = with_large_channel(plant(tiny_model("llama"), Plant(4, None, frozenset({0, 2}), 20, 0)))
    found = detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe(*SMALL))
    assert {one.channel for one in found.residual_sinks} == {CHANNEL, CONSTANT}
    assert [one.channel for one in found.channels] == [20]
    assert tokens(found) == {(4, None, "delimiter", True)}


@pytest.mark.parametrize("seed", range(3))
def test_random_models_have_none(tmp_path: Path, seed: int) -> None:
    model = tiny_model(["llama", "opt", "gemma2"][seed], seed)
    found = detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe(*SMALL))
    assert found.residual_sinks == []
