"""Models that load and make no sense: one sentence, before anything long is computed, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, one_sentence
from safetensors.torch import load_file, save_file
from small_runs import SMALL, model_folder


def tensor(name: str, change: Any) -> Any:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return broken


def setting(**changes: Any) -> Any:
    def broken(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return broken


def fewer_tokens(folder: Path) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensor(name, lambda weight: weight[:100])(folder)
    setting(vocab_size=100)(folder)


def nan(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[3] = torch.nan
    return weight


@pytest.mark.parametrize(("family", "broken", "message"), [
    ("llama", tensor("model.layers.1.mlp.down_proj.weight", nan), "layers.1.mlp.down_proj.weight holds NaN"),
    ("llama", tensor("model.norm.weight", nan), "the weight model.norm.weight holds NaN or Inf"),
    ("qwen2", tensor("model.layers.1.self_attn.q_proj.bias", lambda bias: bias[:32]), "with the shape [32] where [64]"),
    ("qwen3", setting(head_dim=8), "k_norm.weight with the shape [16] where [8] is needed"),
    ("llama", setting(rope_parameters={"rope_type": "default", "rope_theta": 0}), "of rope_parameters most likely"),
    ("llama", setting(rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}), "hold NaN"),
    ("llama", fewer_tokens, "the model's embedding has only 100 rows"),
    ("llama", setting(rms_norm_eps=float("nan")), "the epsilon of norms in config.json"),
    ("llama", setting(rms_norm_eps=-1.0), "are not finite in torch.float32"),
    ("llama", setting(max_position_embeddings=-1), "gives max_position_embeddings as -1"),
    ("qwen3_moe", setting(num_experts_per_tok=9), "fails in its own forward pass (selected index k out of range)"),
    ("llama", tensor("model.layers.1.input_layernorm.weight", lambda gain: gain + 1e30), "are not finite")])
def test_refused_in_one_sentence(family: str, broken: Any, message: str, text_file: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", family)
    broken(folder)
    few = ["detect.rows=4", "detect.length=32", "detect.long_rows=0", "detect.super_weights=false"]
    options = [part for one in (*SMALL, f"calibration.text={text_file}", f"evaluate.text={text_file}", *few)
               for part in ("--set", one)]
    outcome = call("run", "w4a16-sink-rtn", "--model", folder, "--output", tmp_path / "out", *options)
    assert outcome.code in (1, 2)
    assert message in one_sentence(outcome)
    assert "unexpected" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_of_its_own_beside_a_configuration_that_ties_it_stays_one(text_file: Path, tmp_path: Path) -> None:
    """transformers ties only what is the same, or is not there."""
    folder = model_folder(tmp_path / "model")
    setting(tie_word_embeddings=True)(folder)
    options = [part for one in (*SMALL, f"calibration.text={text_file}", f"evaluate.text={text_file}",
                                "evaluate.skip=true") for part in ("--set", one)]
    outcome = call("run", "w4a16-sink-rtn", "--model", folder, "--output", tmp_path / "out", *options)
    assert outcome.code == 0, outcome.err
    tensors = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], load_file(folder / "model.safetensors")["lm_head.weight"])
