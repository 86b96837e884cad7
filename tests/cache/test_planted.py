"""Sinks of known place: each is kept exact, checked on the stored tensors."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import DynamicCache, PreTrainedModel

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.cache import SinkCache, prepare
from sinkquant.cache.layer import SinkLayer
from sinkquant.detect import detect
from sinkquant.models import Decoder
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.recipe import Recipe

LENGTH = 96


def _found(model: PreTrainedModel, tmp_text: str) -> SinkMap:
    recipe = Recipe().replace(["detect.super_weights=false", "detect.rows=24", "detect.long_rows=0",
                               f"calibration.text={tmp_text}"])
    return detect(model, tiny_tokenizer(), recipe=recipe, name="planted")


def _plan(model: PreTrainedModel, sink_map: SinkMap, exact: str) -> KVCachePlan:
    recipe = Recipe().replace([f"kv_cache.exact={exact}", "kv_cache.window=16"])
    made = make_kv_plan(Decoder.of(model).shape("planted"), sink_map, recipe)
    assert made is not None
    return made


def _rows(batch: int = 2) -> torch.Tensor:
    return torch.randint(8, 128, (batch, LENGTH), generator=torch.Generator().manual_seed(3))


def _exact_columns(model: PreTrainedModel, plan: KVCachePlan, ids: torch.Tensor,
                   mask: torch.Tensor | None = None) -> list[list[int]]:
    """Columns kept exact, after checking the stored keys and values of every layer against an unquantized cache."""
    reference, cache = DynamicCache(config=model.config), SinkCache(model.config, plan)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=reference)
        model(ids, attention_mask=mask, past_key_values=cache)
    found: list[list[int]] = []
    for mine, other in zip(cache.layers, reference.layers, strict=True):
        assert isinstance(mine, SinkLayer)
        assert mine.packed_length > 0
        keys, values = mine.dense()
        columns = [[c for c in row if c >= 0] for row in mine.exact_columns.tolist()]
        for row, kept in enumerate(columns):
            for slot, column in enumerate(kept):
                assert torch.equal(mine.exact_keys[row, :, slot], other.keys[row, :, column])
                assert torch.equal(mine.exact_values[row, :, slot], other.values[row, :, column])
                assert torch.equal(keys[row, :, column], other.keys[row, :, column])
                assert torch.equal(values[row, :, column], other.values[row, :, column])
        assert not found or columns == found
        found = columns
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random_text(delimiters=False).split()
    sentences = [" ".join(words[i:i + 24]) for i in range(0, len(words), 24)]
    path.write_text(" . ".join(sentences), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def delimiter(text: str) -> tuple[PreTrainedModel, SinkMap]:
    """A full stop (id 4) that is a sink wherever it stands."""
    model = plant(tiny_model("llama"), Plant(4, None, frozenset({0, 2}), 20, 0))
    return prepare(model), _found(model, text)


@pytest.mark.parametrize("exact", ["detected", "massive"])
def test_a_delimiter_is_kept_wherever_it_stands(delimiter: tuple[PreTrainedModel, SinkMap], exact: str) -> None:
    model, sink_map = delimiter
    ids = _rows()
    ids[0, 14], ids[1, 90] = 4, 4
    found = _exact_columns(model, _plan(model, sink_map, exact), ids)
    assert 14 in found[0]
    assert 90 in found[1]
    assert 14 not in found[1]
    if exact == "massive":
        assert found == [[14], [90]]


@pytest.mark.parametrize("exact", ["detected", "massive"])
def test_one_row_of_a_padded_batch(delimiter: tuple[PreTrainedModel, SinkMap], exact: str) -> None:
    model, sink_map = delimiter
    ids, mask = _rows(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :30] = 0
    ids[1, :30] = 0
    ids[1, 40] = 4
    ids[1, 5] = 4  # padding that looks like a sink is none
    found = _exact_columns(model, _plan(model, sink_map, exact), ids, mask)
    assert 40 in found[1]
    assert 40 not in found[0]
    assert min(found[1]) >= 30


def test_a_row_that_begins_after_the_first_chunk(delimiter: tuple[PreTrainedModel, SinkMap]) -> None:
    model, sink_map = delimiter
    ids, mask = _rows(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :40] = 0
    stored = []
    for chunk in (LENGTH, 16):
        cache = SinkCache(model.config, _plan(model, sink_map, "none"))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            for start in range(0, LENGTH, chunk):
                part = slice(start, start + chunk)
                model(ids[:, part], attention_mask=mask[:, :part.stop], position_ids=positions[:, part],
                      past_key_values=cache)
        assert cache.row_starts.tolist() == [0, 40]
        stored.append(cache.layers[0].dense()[0])
    assert torch.allclose(stored[0][0], stored[1][0], atol=1e-5)
    assert torch.allclose(stored[0][1, :, 40:], stored[1][1, :, 40:], atol=1e-5)


def test_padding_sets_no_range(delimiter: tuple[PreTrainedModel, SinkMap]) -> None:
    """What a row keeps does not depend on how it was padded, beyond where its blocks begin."""
    model, sink_map = delimiter
    plan = _plan(model, sink_map, "none")
    row = _rows(1)
    padded = torch.cat([torch.full((1, 32), 4), row], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :32] = 0
    stored = []
    for ids, given in ((row, None), (padded, mask)):
        cache = SinkCache(model.config, plan)
        positions = torch.arange(ids.shape[1])[None] - (ids.shape[1] - LENGTH)
        with torch.no_grad():
            model(ids, attention_mask=given, position_ids=positions.clamp(min=0), past_key_values=cache)
        stored.append(cache.layers[0].dense()[0][:, :, -LENGTH:])
    assert torch.allclose(stored[0], stored[1], atol=1e-5)


@pytest.mark.parametrize("position", [0, 14])
def test_a_position_is_kept_whatever_stands_there(position: int, text: str) -> None:
    model = prepare(plant(tiny_model("gpt2"), Plant(None, position, frozenset({0, 1, 2}), 20, 0)))
    plan = _plan(model, _found(model, text), "detected")
    assert any(sink.position == position for sink in plan.sinks)
    ids, mask = _rows(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :30] = 0
    found = _exact_columns(model, plan, ids, mask)
    assert position in found[0]
    assert position + 30 in found[1]


def test_late_sinks_are_kept_while_decoding(delimiter: tuple[PreTrainedModel, SinkMap]) -> None:
    model, sink_map = delimiter
    cache = SinkCache(model.config, _plan(model, sink_map, "massive"))
    ids = torch.randint(8, 128, (1, 200), generator=torch.Generator().manual_seed(5))
    ids[0, 180] = 4
    with torch.no_grad():
        model(ids[:, :64], past_key_values=cache)
        for column in range(64, 200):
            model(ids[:, column:column + 1], past_key_values=cache)
    assert all(layer.exact_columns.tolist() == [[180]] for layer in cache.layers)
    assert cache.layers[0].packed_length > 180 - 32


def test_the_learned_column_is_never_lost() -> None:
    """gpt-oss: a large learned sink must go on taking its mass through packed blocks."""
    model = prepare(tiny_model("gpt_oss"))
    with torch.no_grad():
        for block in Decoder.of(model).blocks:
            block.self_attn.sinks.fill_(50.0)
    from kv_plans import kv_plan

    logits = []
    for cache in (DynamicCache(config=model.config), SinkCache(model.config, kv_plan(model, 2))):
        with torch.no_grad():
            model(_rows(1), past_key_values=cache)
            logits.append(model(torch.tensor([[9]]), past_key_values=cache).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
