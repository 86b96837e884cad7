"""Ground truth: a sink is written into random weights, and detection returns exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from detect_helpers import sinking_heads, small_recipe, tokens, write_text
from families import FAMILIES, tiny_model
from planter import Plant, plant
from tiny_tokenizer import random_text, tiny_tokenizer

from sinkquant.artifacts import SinkMap
from sinkquant.detect import detect

HEADS = frozenset({0, 2})
BOS = (1, 0, "bos", True)
STOP = (4, None, "delimiter", True)


def check(found: SinkMap, plants: list[Plant], expected: set[tuple[int | None, int | None, str, bool]]) -> None:
    """Tokens, heads and channels are exactly the planted ones, born where they were planted."""
    assert tokens(found) == expected
    layers = len(found.heads)
    assert sinking_heads(found) == {(layer, head) for what in plants for head in what.heads
                                    for layer in range(what.birth + 1, layers)}
    assert {(c.channel, c.born) for c in found.channels} == {
        (what.channel, f"layers.{what.birth}.mlp") for what in plants if what.massive}
    assert found.super_weights == []


def look(tmp_path: Path, plants: list[Plant], family: str = "llama", *assignments: str, seed: int = 0,
         bos: Literal["none", "once", "twice"] = "once", has_bos: bool = True, text: dict[str, Any] | None = None,
         **overrides: Any) -> SinkMap:
    model = plant(tiny_model(family, seed, **overrides), *plants)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write_text(tmp_path, **(text or {}))
    found = detect(model, tiny_tokenizer(bos, has_bos), path, small_recipe(*assignments))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("token_id", "birth", "expected"), [(1, 0, BOS), (4, 1, STOP)])
def test_a_token_in_every_family(tmp_path: Path, family: str, token_id: int, birth: int, expected: Any) -> None:
    plants = [Plant(token_id, None, HEADS, 20, birth)]
    found = look(tmp_path, plants, family)
    check(found, plants, {expected})
    label = "<s>" if token_id == 1 else "."
    assert found.channels[0].tokens == [label]
    assert found.channels[0].peak == pytest.approx(30, rel=0.2)
    assert found.tokens[0].heads == pytest.approx(2 * (2 - birth) / 12, abs=0.05)
    assert found.sink_rate_repeated_token["0.3"] == 0
    if token_id == 1:
        assert found.sink_rate["0.3"] == pytest.approx(1 / 3, abs=0.01)
        assert found.sink_rate_without_bos is not None
        assert found.sink_rate_without_bos["0.3"] == 0


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize(("position", "bos", "kind"), [
    (0, "none", "first_position"), (0, "once", "first_position"), (14, "once", "token"), (100, "once", "token")])
def test_a_position_whatever_stands_there(tmp_path: Path, family: str, position: int,
                                          bos: Literal["none", "once"], kind: str) -> None:
    plants = [Plant(None, position, HEADS, 20, 0)]
    found = look(tmp_path, plants, family, bos=bos)
    check(found, plants, {(None, position, kind, True)})
    assert found.channels[0].tokens == [f"position {position}"]


@pytest.mark.parametrize("text", ["one row", "rows that begin alike"])
def test_a_first_position_is_not_tied_to_what_the_text_puts_there(tmp_path: Path, text: str) -> None:
    model = plant(tiny_model("gpt2"), Plant(None, 0, frozenset({0, 1, 2}), 20, 0))
    words = random_text(4000).split()
    content = " ".join(words[:100]) if text == "one row" else "\n<|doc|>\n".join(
        " ".join(["w9", *words[start:start + 80]]) for start in range(0, 960, 80))
    place = tmp_path / "text.txt"
    place.write_text(content, encoding="utf-8")
    found = detect(model, tiny_tokenizer("none", has_bos=False), place, small_recipe("detect.long_length=192"))
    assert [(token.token_id, token.position, token.kind) for token in found.tokens] == [(None, 0, "first_position")]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
def test_a_word_that_appears_late(tmp_path: Path, family: str) -> None:
    plants = [Plant(40, None, HEADS, 20, 1)]
    check(look(tmp_path, plants, family, text={"late": "w40"}), plants, {(40, None, "token", True)})


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt_oss"])
def test_bos_and_a_delimiter_that_share_their_heads(tmp_path: Path, family: str) -> None:
    plants = [Plant(1, None, HEADS, 20, 0, also=(4,))]
    check(look(tmp_path, plants, family), plants, {BOS, STOP})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_bos_and_three_delimiters_of_which_none_gets_much(tmp_path: Path, family: str) -> None:
    plants = [Plant(1, None, HEADS, 20, 0, also=(4, 5, 6))]
    expected = {BOS, STOP, (5, None, "delimiter", True), (6, None, "delimiter", True)}
    check(look(tmp_path, plants, family, text={"commas": 0.1}), plants, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bos_and_a_delimiter_without_massive_activations(tmp_path: Path, family: str) -> None:
    plants = [Plant(1, None, HEADS, 20, 0, massive=False, also=(4,))]
    check(look(tmp_path, plants, family), plants, {(1, 0, "bos", False), (4, None, "delimiter", False)})


def test_neighbouring_positions(tmp_path: Path) -> None:
    plants = [Plant(None, 14, HEADS, 20, 0), Plant(None, 15, frozenset({1}), 30, 1)]
    check(look(tmp_path, plants, "opt"), plants, {(None, 14, "token", True), (None, 15, "token", True)})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
def test_two_sinks_with_heads_channels_and_births_of_their_own(tmp_path: Path, family: str) -> None:
    plants = [Plant(1, None, HEADS, 20, 0), Plant(4, None, frozenset({1}), 30, 1)]
    check(look(tmp_path, plants, family), plants, {BOS, STOP})


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_a_sink_without_a_massive_activation(tmp_path: Path, family: str) -> None:
    for token_id, expected in ((1, (1, 0, "bos", False)), (4, (4, None, "delimiter", False))):
        plants = [Plant(token_id, None, HEADS, 20, 0, massive=False)]
        check(look(tmp_path, plants, family), plants, {expected})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_a_massive_activation_without_a_sink(tmp_path: Path, family: str) -> None:
    plants = [Plant(4, None, frozenset(), 20, 1)]
    found = look(tmp_path, plants, family)
    check(found, plants, set())
    assert found.channels[0].tokens == ["."]


def test_a_sink_token_that_is_every_fifth(tmp_path: Path) -> None:
    plants = [Plant(4, None, HEADS, 20, 0)]
    check(look(tmp_path, plants, text={"stops": 0.25}), plants, {STOP})


def test_a_sink_token_that_is_every_third(tmp_path: Path) -> None:
    found = look(tmp_path, [Plant(4, None, HEADS, 20, 0)], text={"stops": 0.5})
    assert tokens(found) == {STOP}
    assert [c.channel for c in found.channels] == [20]
    assert all((head.sink_score > 0.7) == (layer > 0 and index in HEADS)
               for layer, row in enumerate(found.heads) for index, head in enumerate(row))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_head_of_one_layer_in_several_seeds(tmp_path: Path, seed: int) -> None:
    plants = [Plant(1, None, frozenset({seed}), 11 * seed + 4, 1)]
    check(look(tmp_path, plants, seed=seed), plants, {BOS})


@pytest.mark.parametrize(("bos", "has_bos", "assignments", "expected"), [
    ("twice", True, (), {BOS}), ("none", True, (), set()), ("none", True, ("calibration.bos=always",), {BOS}),
    ("none", False, (), set())])
def test_bos_by_what_the_tokenizer_adds(tmp_path: Path, bos: Literal["none", "twice"], has_bos: bool,
                                        assignments: tuple[str, ...], expected: set[Any]) -> None:
    plants = [Plant(1, None, HEADS, 20, 0)]
    found = look(tmp_path, plants, "llama", *assignments, bos=bos, has_bos=has_bos)
    assert tokens(found) == expected
    assert found.tokenization.adds_bos == bos
    assert found.tokenization.rows_start_with_bos == bool(expected)
    assert (found.sink_rate_without_bos is not None) == bool(expected)


@pytest.mark.parametrize("words", [70, 130])
def test_tiny_texts(tmp_path: Path, words: int) -> None:
    for plants, expected in (([Plant(1, None, HEADS, 20, 0)], BOS), ([Plant(4, None, HEADS, 20, 0)], STOP)):
        found = look(tmp_path, plants, text={"words": words})
        check(found, plants, {expected})
        assert "no row of 192 tokens" in found.notes[0]


@pytest.mark.parametrize("positions", [64, 128])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_short_contexts(tmp_path: Path, family: str, positions: int) -> None:
    plants = [Plant(4, None, HEADS, 20, 0)]
    check(look(tmp_path, plants, family, max_position_embeddings=positions), plants, {STOP})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_bfloat16(tmp_path: Path, family: str) -> None:
    plants = [Plant(1, None, HEADS, 20, 1)]
    found = look(tmp_path, plants, family, dtype=torch.bfloat16)
    check(found, plants, {BOS})
    assert found.model.dtype == "bfloat16"


def test_learned_sinks_where_they_draw_attention(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for logits, expected in (([6.0, -20.0, 6.0, -20.0], {(None, None, "learned", False)}), ([-20.0] * 4, set())):
        model = tiny_model("gpt_oss")
        for block in model.model.layers:
            block.self_attn.sinks.data[:] = torch.tensor(logits)
        found = detect(model, tiny_tokenizer(), text, small_recipe())
        assert tokens(found) == expected
        assert sinking_heads(found) == {(layer, head) for layer in range(3) for head in (0, 2) if expected}
        if expected:
            assert found.tokens[0].heads == 0.5
            assert found.tokens[0].attention == pytest.approx(0.46, abs=0.04)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    plants = [Plant(1, None, HEADS, 20, 0)]
    first, second = (look(tmp_path, plants, "qwen3_moe").to_json() for _ in range(2))
    assert first == second
