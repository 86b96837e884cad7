"""Quantization of experts that stay on disk: what a model in memory gives, and the same bytes after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_mixture
from interruptions import killed
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.formats import quantize_to
from sinkquant.formats.load import open_quantized, read_checkpoint
from sinkquant.models import Decoder, Walk, load_model, on_disk, open_model
from sinkquant.policy import make_plan
from sinkquant.quantize import layer, quantize, quantized_blocks, state_of
from sinkquant.quantize.transforms import rotate
from sinkquant.recipe import Recipe

QUICK = ["weights.group_size=32", "weights.descent=0", "weights.scale_search=false", "calibration.rows=6",
         "calibration.length=16", "calibration.batch_size=2"]


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any layer of experts is large, and every expert is handed over by itself."""
    monkeypatch.setattr(on_disk, "LARGE", 0)
    monkeypatch.setattr(layer, "WAITING", 0)


def planned(model: PreTrainedModel, text: Path, *more: str) -> Plan:
    decoder = Decoder.of(model)
    recipe = Recipe().replace([*QUICK, f"calibration.text={text}", *more])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)


def source(family: str, folder: Path) -> Path:
    tiny_mixture(family, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


CASES = [("mixtral", ("weights.method=gptq",)), ("qwen3_moe", ("weights.method=gptq", "weights.rotate=full")),
         ("qwen3_moe", ("weights.method=gptq", "protect.statistics=attention")),
         ("deepseek_v3", ("weights.method=gptq", "weights.bits=3")),
         ("olmoe", ("prune.method=wanda", "weights.ignore=['*experts*']"))]


@pytest.mark.parametrize(("family", "more"), CASES)
def test_the_result_is_that_of_the_model_in_memory(family: str, more: tuple[str, ...], text_file: Path,
                                                   tmp_path: Path) -> None:
    folder, tokenizer = source(family, tmp_path / "source"), tiny_tokenizer()
    model = load_model(folder)
    plan = planned(model, text_file, *more)
    state = state_of(quantize(model, plan, tokenizer))
    assert state is not None
    opened = open_model(folder)
    decoder, pieces, tokens = Decoder.of(opened), [], {}
    rotate(decoder, plan)
    losses: dict[str, float] = {}
    for block in quantized_blocks(decoder, plan, tokenizer, "cpu", torch.float32):
        assert len([name for name in block.losses if ".experts." in name]) <= 3  # one expert at a time
        pieces.append(block)
        losses |= block.losses
        tokens |= block.tokens
    assert [block.index for block in pieces if block.ended] == list(range(2))
    assert tokens == state.tokens
    assert losses.keys() == state.losses.keys()
    assert not decoder.alone
    for name, loss in losses.items():
        assert loss == pytest.approx(state.losses[name], rel=0.02, abs=1e-6), name
    for block in pieces:
        for name, packed in block.weights.items():
            other = state.weights[name]
            assert (packed.codes == other.codes).float().mean() > 0.98, name
        for name, tensor in block.dense.items():
            assert ((tensor == 0) == (model.get_parameter(name) == 0)).float().mean() > 0.98, name


@pytest.mark.parametrize(("family", "more"), CASES[:1] + CASES[-1:])
def test_a_run_that_was_killed_ends_with_the_same_bytes(family: str, more: tuple[str, ...], text_file: Path,
                                                        tmp_path: Path) -> None:
    folder, tokenizer = source(family, tmp_path / "source"), tiny_tokenizer()
    plan = planned(open_model(folder), text_file, *more)
    quantize_to(tmp_path / "whole", open_model(folder), plan, tokenizer, plan.sink_map)
    for pieces in (7, 25 if family == "mixtral" else 3):  # in the middle of the first block, and of the second
        with killed(pieces):
            quantize_to(tmp_path / "killed", open_model(folder), plan, tokenizer, plan.sink_map)
    quantize_to(tmp_path / "killed", open_model(folder), plan, tokenizer, plan.sink_map)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    content = read_checkpoint(tmp_path / "whole")
    assert content is not None
    assert {owner: sum(counts) for owner, counts in content["expert_tokens"].items()} == {
        f"model.layers.{index}.mlp.experts": 2 * 6 * 16 for index in range(2)}


def test_packed_experts_are_read_one_at_a_time_too(text_file: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = source("qwen3_moe", tmp_path / "source"), torch.arange(3, 67).reshape(4, 16)
    plan = planned(open_model(folder), text_file, "weights.method=rtn")
    quantize_to(tmp_path / "packed", open_model(folder), plan, tiny_tokenizer(), plan.sink_map)
    steps = list(Walk(Decoder.of(open_quantized(tmp_path / "packed")), rows, 2).steps())
    assert all(step.on_disk for step in steps)
    monkeypatch.setattr(on_disk, "LARGE", 1 << 25)
    for step, whole in zip(steps, Walk(Decoder.of(open_quantized(tmp_path / "packed")), rows, 2).steps(), strict=True):
        assert not whole.on_disk
        torch.testing.assert_close(step.outputs, whole.run(), rtol=1e-4, atol=1e-5)
