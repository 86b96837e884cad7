"""A model family from outside the package is detected, planned, quantized, saved, loaded and reported."""

from __future__ import annotations

from pathlib import Path

import torch
from develop.toy_family import ToyConfig, ToyForCausalLM
from small_runs import small_recipe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import sinkquant as sq
from sinkquant import Plan
from sinkquant.models import Decoder

PARTS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2"}


def tiny_toy() -> ToyForCausalLM:
    torch.manual_seed(0)
    return ToyForCausalLM(ToyConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def test_what_it_is_made_of_is_found() -> None:
    shape = Decoder.of(tiny_toy()).shape("toy")
    assert {name.removeprefix("model.layers.1.") for name, one in shape.linears.items() if one.block == 1} == PARTS
    # One norm stands before the attention and before the MLP, so that it can take a scale for both.
    assert shape.linears["model.layers.0.mlp.fc1"].scaled_by == "model.layers.0.input_layernorm"
    assert shape.linears["model.layers.0.mlp.fc2"].scaled_by == "model.layers.0.mlp.fc1"
    assert shape.linears["model.layers.0.self_attn.o_proj"].reads == "values"
    assert not shape.not_rotated


def test_a_family_of_another_package_goes_from_a_recipe_to_a_report(tmp_path: Path, text_file: Path) -> None:
    tiny_toy().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = small_recipe(text_file, "weights.rotate=full", "detect.super_weights=false", "evaluate.fidelity=false")
    report = sq.run(recipe, tmp_path / "model", tmp_path / "out")
    assert report is not None
    assert [row.name for row in report.rows][:3] == ["unquantized", "sink_aware", "control"]
    assert len(Plan.load(tmp_path / "out" / "plan.json").modules) == 2 * len(PARTS)
    rows = torch.arange(8, 72)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)(rows).logits
    exact = tiny_toy()(rows).logits
    assert (plain - exact).norm() < 0.3 * exact.norm()
