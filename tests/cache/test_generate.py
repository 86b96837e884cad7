"""All of generate. With everything exact the cache is token-identical to DynamicCache; that is the test."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import DynamicCache, PreTrainedModel

from sinkquant.artifacts.kv import cache_bytes
from sinkquant.cache import SinkCache, load_cache, prepare, save_cache
from sinkquant.errors import RequestError

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "gpt_neox", "qwen3_moe"]
NEW = 40


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return prepare(tiny_model("llama"))


def _padded(rows: int = 3, length: int = 70) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :20] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _generate(model: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
                              **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_is_token_identical(family: str) -> None:
    model = prepare(tiny_model(family))
    inputs = _padded()
    expected = _generate(model, DynamicCache(config=model.config), inputs)
    plan = kv_plan(model, 16, exact="first-n", first_n=2)
    cache = SinkCache(model.config, plan)
    assert torch.equal(_generate(model, cache, inputs), expected)
    packed = [layer for layer, one in zip(cache.layers, plan.layers, strict=True) if one.packed]
    assert all(layer.packed_length > 0 for layer in packed)
    assert packed[0].exact_columns.tolist() == [[0, 1], [20, 21], [0, 1]]
    assert cache.nbytes() == cache_bytes(plan, cache.get_seq_length(), 2, 3, 4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 4},
                                      {"prefill_chunk_size": 16}], ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_packed_sliding_windows_are_token_identical(family: str, settings: dict[str, Any]) -> None:
    model = prepare(tiny_model(family))
    inputs = _padded(1 if "prompt_lookup_num_tokens" in settings else 3, 120)
    expected = _generate(model, DynamicCache(config=model.config), inputs, **settings)
    plan = kv_plan(model, 16, sliding=True, window=8, exact="first-n", first_n=2)
    cache = SinkCache(model.config, plan)
    assert torch.equal(_generate(model, cache, inputs, **settings), expected)
    sliding = [layer for layer in cache.layers if layer.is_sliding]
    assert all(layer.dropped > 0 and layer.packed_length > 0 for layer in sliding)
    if not settings:
        assert cache.nbytes() == cache_bytes(plan, cache.get_seq_length(), 2, 3, 4)
    low = SinkCache(model.config, kv_plan(model, 2, sliding=True, window=8, exact="first-n", first_n=2))
    assert _generate(model, low, inputs, **settings).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    model = prepare(tiny_model("llama", dtype=dtype))
    inputs = _padded()
    expected = _generate(model, DynamicCache(config=model.config), inputs)
    assert torch.equal(_generate(model, SinkCache(model.config, kv_plan(model, 16)), inputs), expected)
    low = SinkCache(model.config, kv_plan(model, 2, exact="first-n", first_n=1))
    assert _generate(model, low, inputs).shape == expected.shape
    assert low.layers[0].dense()[0].dtype == dtype


@pytest.mark.parametrize("settings", [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 4},
    {"prefill_chunk_size": 16}], ids=lambda settings: next(iter(settings)))
def test_every_way_of_decoding(llama: PreTrainedModel, settings: dict[str, Any]) -> None:
    inputs = _padded(1 if "prompt_lookup_num_tokens" in settings else 3)
    expected = _generate(llama, DynamicCache(config=llama.config), inputs, **settings)
    cache = SinkCache(llama.config, kv_plan(llama, 16, exact="first-n", first_n=2))
    assert torch.equal(_generate(llama, cache, inputs, **settings), expected)
    low = SinkCache(llama.config, kv_plan(llama, 2, exact="first-n", first_n=2))
    assert _generate(llama, low, inputs, **settings).shape == expected.shape


def test_sampled_sequences(llama: PreTrainedModel) -> None:
    found = []
    for cache in (DynamicCache(config=llama.config), SinkCache(llama.config, kv_plan(llama, 16))):
        torch.manual_seed(0)
        found.append(llama.generate(**_padded(), past_key_values=cache, do_sample=True, num_return_sequences=2,
                                    max_new_tokens=NEW, min_new_tokens=NEW))
    assert torch.equal(found[0], found[1])


def test_assisted_decoding(llama: PreTrainedModel) -> None:
    assistant = tiny_model("llama", seed=1)
    inputs = _padded(1)
    expected = _generate(llama, DynamicCache(config=llama.config), inputs, assistant_model=assistant)
    cache = SinkCache(llama.config, kv_plan(llama, 16))
    assert torch.equal(_generate(llama, cache, inputs, assistant_model=assistant), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_turns_deepcopy_and_restore(family: str, tmp_path: Path) -> None:
    model = prepare(tiny_model(family))
    inputs = _padded()
    turn = torch.randint(8, 128, (3, 9), generator=torch.Generator().manual_seed(2))

    def second(cache: Any, first: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([first, turn], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 9, dtype=torch.long)], dim=1)
        return _generate(model, cache, {"input_ids": ids, "attention_mask": mask})

    reference = DynamicCache(config=model.config)
    first = _generate(model, reference, inputs)
    expected = second(reference, first)
    cache = SinkCache(model.config, kv_plan(model, 16, exact="first-n", first_n=1))
    assert torch.equal(_generate(model, cache, inputs), first)
    twin = copy.deepcopy(cache)
    save_cache(cache, tmp_path / "cache.safetensors")
    assert torch.equal(second(cache, first), expected)
    assert torch.equal(second(twin, first), expected)
    restored = load_cache(model.config, tmp_path / "cache.safetensors")
    assert torch.equal(second(restored, first), expected)


def test_low_bits_survive_saving(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = SinkCache(llama.config, kv_plan(llama, 3, exact="first-n", first_n=3, rotate=True))
    _generate(llama, cache, _padded())
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(llama.config, tmp_path / "cache.safetensors")
    for mine, other in zip(cache.layers, restored.layers, strict=True):
        assert torch.equal(mine.dense()[0], other.dense()[0])
        assert torch.equal(mine.dense()[1], other.dense()[1])
    assert restored.nbytes() == cache.nbytes()


def test_a_reset_cache_is_a_new_one(llama: PreTrainedModel) -> None:
    plan = kv_plan(llama, 2, exact="first-n", first_n=2)
    cache = SinkCache(llama.config, plan)
    _generate(llama, cache, _padded())
    cache.reset()
    fresh = _generate(llama, SinkCache(llama.config, plan), _padded(2))
    assert torch.equal(_generate(llama, cache, _padded(2)), fresh)


def test_a_cache_that_is_not_shown_the_mask_refuses_a_batch() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, kv_plan(model, 2, exact="first-n", first_n=2))
    with pytest.raises(RequestError, match="prepare"):
        _generate(model, cache, _padded())
    one = SinkCache(model.config, kv_plan(model, 2, exact="first-n", first_n=2))
    _generate(model, one, _padded(1))
    assert one.layers[0].exact_columns.tolist() == [[0, 1]]


def test_another_batch_size_or_model_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = SinkCache(llama.config, kv_plan(llama, 2))
    with torch.no_grad():
        llama(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        with pytest.raises(RequestError, match="holds 2 rows"):
            llama(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
    other = tiny_model("llama", num_hidden_layers=2)
    with pytest.raises(RequestError, match="3 layers"):
        SinkCache(other.config, kv_plan(llama))
    with pytest.raises(RequestError, match="no KV cache"):
        load_cache(llama.config, tmp_path / "nothing")
