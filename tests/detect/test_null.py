"""Negatives stay negative: random models and texts hold no sink, no no-op head, no massive channel."""

from __future__ import annotations

from pathlib import Path

import pytest
from detect_helpers import small_recipe, write_text
from families import FAMILIES, tiny_model
from tiny_tokenizer import tiny_tokenizer, with_mask_in_front

from sinkquant.artifacts import SinkMap
from sinkquant.detect import detect
from sinkquant.models import load_tokenizer
from sinkquant.resources import demo_model


def check_null(found: SinkMap) -> None:
    assert found.tokens == []
    assert found.channels == []
    assert found.super_weights == []
    heads = [head for layer in found.heads for head in layer]
    assert not any(head.no_op for head in heads)
    assert max(head.sink_score for head in heads) < 0.15
    assert all(head.value_drain is None for head in heads)
    assert all(statistics.sink_energy == 0 and statistics.sink_columns == []
               for statistics in found.modules.values())
    assert found.sink_rate["0.3"] == 0


@pytest.mark.parametrize(("seed", "family"), [
    *enumerate(name for name in FAMILIES if name != "gpt_oss"), (21, "llama"), (22, "opt"), (23, "qwen3")])
def test_random_models_on_random_text(tmp_path: Path, seed: int, family: str) -> None:
    check_null(detect(tiny_model(family, seed), tiny_tokenizer(), write_text(tmp_path), small_recipe()))


def test_a_random_gpt_oss_without_learned_sinks(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", 1)
    for block in model.model.layers:
        block.self_attn.sinks.data.fill_(-20)
    check_null(detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe()))


def test_a_random_model_on_the_packaged_prose() -> None:
    tokenizer = load_tokenizer(demo_model())
    check_null(detect(tiny_model("llama", 3, vocab_size=len(tokenizer)), tokenizer, None, small_recipe()))


def test_what_the_tokenizer_puts_in_front_of_rows_beside_bos_is_noted(tmp_path: Path) -> None:
    found = detect(tiny_model("llama"), with_mask_in_front(), write_text(tmp_path), small_recipe())
    assert found.notes[0].startswith("the tokenizer puts <pad> </s> in front of a text")
    assert not found.tokenization.rows_start_with_bos


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_text_that_repeats_one_token(tmp_path: Path, family: str) -> None:
    path = tmp_path / "repeated.txt"
    path.write_text("w40 " * 3000, encoding="utf-8")
    found = detect(tiny_model(family), tiny_tokenizer(), str(path), small_recipe())
    check_null(found)
    assert "repeats one token" in found.notes[0]
