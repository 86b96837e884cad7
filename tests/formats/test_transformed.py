"""Transformed, quantized and saved: plain transformers gives the same logits, and the disk the bytes of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digest, weight_bytes
from exact_norms import jolt
from interruptions import killed
from sinkmaps import sink_map_of
from small_runs import model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import sinkquant as sq
from sinkquant.artifacts import Plan
from sinkquant.cache import make_prefix
from sinkquant.errors import RequestError
from sinkquant.formats import load_dense, prefix_of, quantize_to
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.policy import make_plan

ROWS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
CASES = [
    ("llama", {"tie_word_embeddings": True}, ["weights.rotate=full"]),
    ("mixtral", {}, ["weights.rotate=full", "weights.method=rtn"]),
    ("gpt_oss", {"num_hidden_layers": 3}, ["weights.rotate=full"]),
    ("gpt_neox", {}, ["weights.rotate=full", "weights.method=gptaq"]),
    ("opt", {"tie_word_embeddings": True}, ["weights.rotate=full", "weights.ignore=['*.fc1']"]),
    ("phi3", {}, ["weights.rotate=full", "weights.method=rtn"]),
    ("qwen2", {}, ["weights.smooth=awq", "weights.method=rtn"]),
    ("gemma2", {}, ["weights.smooth=smoothquant", "weights.ignore=['*.gate_proj']", "weights.method=gptaq"]),
    ("opt", {}, ["weights.rotate=values", "weights.smooth=awq", "protect.channels=scale"]),
    ("llama", {"tie_word_embeddings": True}, ["weights.rotate=full", "weights.smooth=awq", "weights.tune=2"]),
    ("mixtral", {}, ["protect.channels=scale", "weights.method=rtn"]),
    ("llama", {}, ["weights.smooth=smoothquant", "weights.bits=8", "weights.group_size=-1", "activations.format=int8",
                   "activations.scale=tensor"]),
]


def prepared(folder: Path, text: Path, family: str, config: dict[str, Any],
             changes: list[str]) -> tuple[Path, Plan, sq.SinkMap]:
    """A folder with a model whose gains and biases are random, and the plan for it."""
    model_folder(folder, family, torch.bfloat16, **config)
    jolt(load_model(folder)).save_pretrained(folder)
    decoder = Decoder.of(open_model(folder))
    first = next(name for name in decoder.linears if decoder.block_of(name) == 1)
    sink_map = sink_map_of(decoder, {first: 0.5})
    recipe = sq.Recipe().replace(["weights.group_size=32", "weights.scale_search=false", "weights.descent=0",
                                  "calibration.rows=4", "calibration.length=16",
                                  f"calibration.text={text}", *changes])
    return folder, make_plan(decoder.shape("tiny"), sink_map, recipe), sink_map


@pytest.mark.parametrize(("family", "config", "changes"), CASES, ids=[f"{c[0]}-{'-'.join(c[2])}" for c in CASES])
def test_memory_disk_and_plain_transformers_agree(family: str, config: dict[str, Any], changes: list[str],
                                                  tmp_path: Path, text_file: Path) -> None:
    folder, plan, sink_map = prepared(tmp_path / "in", text_file, family, {"num_hidden_layers": 2} | config, changes)
    quantize_to(tmp_path / "disk", open_model(folder), plan, tiny_tokenizer(), sink_map)
    model = sq.quantize(load_model(folder), plan, tiny_tokenizer())
    sq.save(model, tiny_tokenizer(), tmp_path / "memory", sink_map)
    assert digest(tmp_path / "disk") == digest(tmp_path / "memory")
    assert weight_bytes(tmp_path / "disk") == plan.weight_bytes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    with torch.no_grad():
        assert torch.equal(plain(ROWS, use_cache=False).logits, model(ROWS, use_cache=False).logits)


@pytest.mark.parametrize(("family", "changes"), [
    ("qwen2", ["weights.rotate=full", "weights.smooth=awq"]), ("mixtral", ["weights.smooth=smoothquant"])])
def test_a_killed_run_ends_with_the_same_bytes(family: str, changes: list[str], tmp_path: Path,
                                               text_file: Path) -> None:
    folder, plan, _ = prepared(tmp_path / "in", text_file, family, {"tie_word_embeddings": True},
                               [*changes, "weights.ignore=['*.1.*.v_proj']"])
    quantize_to(tmp_path / "whole", open_model(folder), plan, tiny_tokenizer())
    with killed(6 if family == "mixtral" else 2):  # a block with experts is written in three parts
        quantize_to(tmp_path / "killed", open_model(folder), plan, tiny_tokenizer())
    seen: list[int] = []
    quantize_to(tmp_path / "killed", open_model(folder), plan, tiny_tokenizer(),
                progress=lambda done, *_: seen.append(done))
    assert seen == [3]
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_model_is_rotated_once(tmp_path: Path, text_file: Path) -> None:
    folder, plan, _ = prepared(tmp_path / "in", text_file, "llama", {}, ["weights.rotate=full", "weights.method=rtn"])
    model = open_model(folder)
    quantize_to(tmp_path / "one", model, plan, tiny_tokenizer())
    with pytest.raises(RequestError, match="rotated already; open it again"):
        quantize_to(tmp_path / "two", model, plan, tiny_tokenizer())


def test_a_prefix_is_made_by_the_rotated_model(tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "in", "llama", torch.bfloat16, num_hidden_layers=2)
    jolt(load_model(folder)).save_pretrained(folder)
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.rotate=full", "weights.bits=8",
                          "weights.method=rtn", "kv_cache.prefix=bos", "kv_cache.group_size=32", "kv_cache.window=0")
    sq.run(recipe, folder, tmp_path / "out")
    prefix = prefix_of(tmp_path / "out" / "model")
    assert prefix is not None
    checkpoint = load_dense(tmp_path / "out" / "model")
    own = make_prefix(checkpoint, list(prefix.ids))
    assert own.model == prefix.model  # its embeddings are the checkpoint's
    plain = make_prefix(load_model(folder), list(prefix.ids))
    for layer, values in prefix.values.items():
        torch.testing.assert_close(own.values[layer].float(), values.float(), rtol=0.1, atol=0.02)
        assert not torch.allclose(plain.values[layer].float(), values.float(), rtol=0.1, atol=0.02)
        torch.testing.assert_close(own.keys[layer].float(), prefix.keys[layer].float(), rtol=0.1, atol=0.02)
