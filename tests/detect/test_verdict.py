"""Whether a model has sinks: "no" is an answer, with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from detect_helpers import small_recipe, write_text
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import SinkMap, SinkVerdict
from sinkquant.detect import detect

HEADS = frozenset({0, 2})


def verdict(model: PreTrainedModel, folder: Path, text: str | None = None) -> SinkVerdict:
    found: SinkMap = detect(model, tiny_tokenizer(), text or write_text(folder),
                            small_recipe("detect.super_weights=false"))
    assert found.verdict is not None
    assert found.verdict.sinks == bool(found.tokens)
    return found.verdict


def gated_model() -> PreTrainedModel:
    """A random AFMoE, whose attention passes a gate (2505.06708)."""
    config = AutoConfig.for_model("afmoe", vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
                                  num_experts_per_tok=2, moe_intermediate_size=32, max_position_embeddings=256)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_planted_sink_is_named_with_what_it_receives_and_carries(tmp_path: Path) -> None:
    given = verdict(plant(tiny_model("llama"), Plant(4, None, HEADS, 20, 0)), tmp_path)
    assert given.sentence == "This model has one sink: '.'."
    assert given.reason.startswith("'.' receives more than 0.3 of the attention of 33% of the heads, and carries a ")
    assert given.reason.endswith("from layers.0.mlp on")


def test_a_sink_without_massive_activations_is_not_said_to_carry_one(tmp_path: Path) -> None:
    model = plant(tiny_model("llama"), Plant(4, None, HEADS, 20, 0, massive=False),
                  Plant(1, None, frozenset(), 30, 0))
    given = verdict(model, tmp_path)
    assert given.sinks
    assert "carries" not in given.reason


def test_several_sinks_are_counted(tmp_path: Path) -> None:
    model = plant(tiny_model("llama"), Plant(1, None, HEADS, 20, 0), Plant(4, None, frozenset({1, 3}), 30, 0))
    assert verdict(model, tmp_path).sentence == "This model has 2 sinks: '<s>' at position 0, '.'."


def test_massive_activations_that_draw_no_attention_are_no_sinks(tmp_path: Path) -> None:
    given = verdict(plant(tiny_model("llama"), Plant(4, None, frozenset(), 20, 0)), tmp_path)
    assert not given.sinks
    assert given.sentence.startswith("This model has no sinks")
    assert given.reason.endswith("the first position does in 0.0% of them; its massive activations draw no attention")


def test_a_model_with_gated_attention_has_no_sinks_and_the_gate_is_named(tmp_path: Path) -> None:
    given = verdict(gated_model(), tmp_path)
    assert not given.sinks
    assert "attention passes a gate" in given.reason
    assert "gate" not in verdict(tiny_model("mixtral"), tmp_path).reason


@pytest.mark.parametrize("planted", [False, True])
def test_a_text_that_repeats_one_token_says_nothing_of_the_model(tmp_path: Path, planted: bool) -> None:
    path = tmp_path / "repeated.txt"
    path.write_text("w40 " * 3000, encoding="utf-8")
    model = plant(tiny_model("llama"), Plant(4, None, HEADS, 20, 0)) if planted else tiny_model("llama")
    found = detect(model, tiny_tokenizer(), str(path), small_recipe("detect.super_weights=false"))
    assert found.verdict is None
