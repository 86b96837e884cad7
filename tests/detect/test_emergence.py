"""The block in which massive activations emerge, beside the largest rise of any other token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detect_helpers import small_recipe, write_text
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer

from sinkquant.detect import detect
from sinkquant.detect.emergence import emergence
from sinkquant.detect.residual import ResidualStream

HEADS = frozenset({0, 2})


@pytest.mark.parametrize(("family", "birth"), [("llama", 0), ("llama", 3), ("qwen3", 1), ("gemma3_text", 1),
                                               ("opt", 2)])
def test_it_is_the_block_where_the_sink_was_planted(tmp_path: Path, family: str, birth: int) -> None:
    more = {"num_hidden_layers": 5} | ({"layer_types": ["sliding_attention"] * 5} if family == "gemma3_text" else {})
    model = plant(tiny_model(family, **more), Plant(4, None, HEADS, 20, birth))
    found = detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe("detect.super_weights=false"))
    assert found.emergence is not None
    assert (found.emergence.block, found.emergence.place) == (birth, f"layers.{birth}.mlp")
    assert found.emergence.rise > 5 * found.emergence.null
    assert found.verdict is not None
    assert found.verdict.sinks


def stream(*norms: list[float]) -> ResidualStream:
    """One row whose tokens have these norms at every boundary, in a block each."""
    made = ResidualStream()
    for index, sizes in enumerate(norms):
        states = torch.ones(1, len(sizes), 4) * torch.tensor(sizes)[None, :, None] / 2
        made.add("embedding" if index == 0 else f"layers.{index - 1}", [states])
    return made


def test_it_is_where_the_norm_rises_most_over_the_median_tokens() -> None:
    massive = torch.tensor([[True, False, False, False]])
    found = emergence(stream([1, 1, 1, 1], [3, 1, 2, 1], [80, 2, 2, 2], [90, 3, 3, 3], [95, 4, 4, 4]), massive)
    assert found is not None
    assert (found.place, found.block) == ("layers.1", 1)
    assert found.norm == pytest.approx(40)
    assert found.rise == pytest.approx(37)
    assert found.null == pytest.approx(1)


def test_there_is_none_where_other_tokens_rise_as_much_or_no_attention_reads_it() -> None:
    massive = torch.tensor([[True, False, False, False]])
    assert emergence(stream([1, 1, 1, 1], [3, 1, 9, 1], [4, 1, 9, 1], [4, 1, 9, 1]), massive) is None
    last = emergence(stream([1, 1, 1, 1], [2, 1, 1, 1], [2, 1, 1, 1], [90, 1, 1, 1]), massive)
    assert last is not None
    assert last.block == 0


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_nothing_rises_before_the_only_block(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[4, 7] = 50.0
    found = detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe("detect.super_weights=false"))
    assert found.emergence is None
