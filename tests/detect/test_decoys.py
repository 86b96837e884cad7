"""What looks like a sink and is none stays out of the sinks, at every depth; what is a weaker one is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detect_helpers import small_recipe, tokens, write_text
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer

from sinkquant.artifacts import SinkMap
from sinkquant.detect import detect

BOS = (1, 0, "bos", True)
SINK = Plant(1, None, frozenset({0, 2}), 20, 0)
HALF_OF_THE_WORDS = tuple(range(9, 68))
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2"]
GEMMA: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
"""Sandwich norms, QK-norms, and position 0 out of sight of long rows in five layers of six."""


def look(tmp_path: Path, plants: list[Plant], family: str = "llama", text: dict[str, Any] | None = None,
         settings: tuple[str, ...] = (), **overrides: Any) -> SinkMap:
    model = plant(tiny_model(family, **overrides), *plants)
    return detect(model, tiny_tokenizer(), write_text(tmp_path, **(text or {})),
                  small_recipe("detect.super_weights=false", *settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("birth", [1, 2])
def test_an_outlier_channel_that_many_ordinary_words_carry(tmp_path: Path, family: str, birth: int) -> None:
    found = look(tmp_path, [SINK, Plant(8, None, frozenset(), 30, birth, also=HALF_OF_THE_WORDS)], family)
    assert tokens(found) == {BOS}
    assert [c.channel for c in found.channels] == [20]
    (outlier,) = found.outlier_channels
    assert (outlier.channel, outlier.first, outlier.last) == (30, f"layers.{birth}.mlp", "layers.2.mlp")
    assert outlier.share == pytest.approx(60 / 120, abs=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_word_of_the_last_block_is_read_by_no_attention(tmp_path: Path, family: str) -> None:
    found = look(tmp_path, [Plant(1, None, frozenset({0}), 20, 0), Plant(40, None, frozenset(), 30, 2)], family)
    assert tokens(found) == {BOS}
    assert [c.channel for c in found.channels] == [20]
    assert [(c.channel, c.first) for c in found.outlier_channels] == [(30, "layers.2.mlp")]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_head_that_looks_at_one_word(tmp_path: Path, family: str) -> None:
    found = look(tmp_path, [SINK, Plant(40, None, frozenset({1}), 30, 1, massive=False)], family)
    assert tokens(found) == {BOS}
    assert found.secondary == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_massive_word_that_no_head_looks_at(tmp_path: Path, family: str) -> None:
    found = look(tmp_path, [SINK, Plant(40, None, frozenset(), 30, 1)], family)
    assert tokens(found) == {BOS}
    assert {c.channel for c in found.channels} == {20, 30}


def test_a_weaker_delimiter_is_a_secondary_sink(tmp_path: Path) -> None:
    found = look(tmp_path, [Plant(1, None, frozenset({0, 2, 3}), 20, 0), Plant(4, None, frozenset({1}), 30, 0,
                                                                                massive=False)])
    assert tokens(found) == {BOS}
    (weaker,) = found.secondary
    assert (weaker.token_id, weaker.kind, weaker.layers, weaker.criteria) == (4, "delimiter", [1, 2], ["attention"])


def test_a_delimiter_of_as_many_heads_is_a_sink(tmp_path: Path) -> None:
    found = look(tmp_path, [SINK, Plant(4, None, frozenset({1}), 30, 0, massive=False)])
    assert tokens(found) == {BOS, (4, None, "delimiter", False)}
    assert found.secondary == []


def test_every_sink_says_what_made_it_one(tmp_path: Path) -> None:
    (token,) = look(tmp_path, [SINK]).tokens
    assert (token.criteria, token.layers) == (["attention", "massive"], [1, 2])
    found = look(tmp_path, [Plant(1, None, frozenset({0, 2}), 20, 0, also=(4, 5, 6))], text={"commas": 0.1})
    assert {tuple(token.criteria) for token in found.tokens} == {("shared_mass", "massive")}
    (token,) = look(tmp_path, [Plant(1, None, frozenset({0, 2}), 20, 0, massive=False)]).tokens
    assert token.criteria == ["attention"]


def test_many_layers(tmp_path: Path) -> None:
    plants = [Plant(1, None, frozenset({0, 2, 3}), 20, 4),
              Plant(4, None, frozenset({1}), 30, 4, massive=False, last=30),
              Plant(40, None, frozenset({1}), 31, 38, massive=False, last=40),
              Plant(8, None, frozenset(), 32, 46, also=HALF_OF_THE_WORDS)]
    found = look(tmp_path, plants, num_hidden_layers=48, intermediate_size=32, settings=("detect.rows=6",
                                                                                         "detect.long_rows=0"))
    assert tokens(found) == {BOS}
    assert found.tokens[0].layers == list(range(5, 48))
    assert [c.channel for c in found.channels] == [20]
    assert [(token.token_id, token.layers) for token in found.secondary] == [(4, list(range(5, 31)))]
    assert [c.channel for c in found.outlier_channels] == [32]


@pytest.mark.parametrize("peak", [30.0, 3e4])
def test_a_model_like_gemma_3(tmp_path: Path, peak: float) -> None:
    plants = [Plant(1, None, frozenset({0, 2}), 20, 1, peak=peak),
              Plant(8, None, frozenset(), 30, 4, also=HALF_OF_THE_WORDS)]
    found = look(tmp_path, plants, "gemma3_text", **GEMMA)
    assert tokens(found) == {BOS}
    assert found.tokens[0].layers == [2, 3, 4, 5]
    assert [(c.channel, c.born) for c in found.channels] == [(20, "layers.1.mlp")]
    assert [c.channel for c in found.outlier_channels] == [30]


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_alone_make_no_sink(tmp_path: Path, family: str) -> None:
    found = look(tmp_path, [Plant(8, None, frozenset(), 30, 1, also=HALF_OF_THE_WORDS)], family)
    assert (found.tokens, found.secondary, found.channels) == ([], [], [])
    assert [c.channel for c in found.outlier_channels] == [30]


def test_few_rows_pass_the_output_head_together(tmp_path: Path) -> None:
    model, largest = plant(tiny_model("llama"), SINK), [0]
    model.lm_head.register_forward_hook(lambda _, __, output: largest.append(output.numel()))
    detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe("detect.rows=40"))
    assert 0 < max(largest) <= 8 * 64 * 128
    assert torch.isfinite(torch.tensor(largest)).all()
