"""Sliding windows that see the sinks beyond them: the same as the model itself under a mask that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import DynamicCache, PreTrainedModel

from sinkquant.artifacts import KVCachePlan
from sinkquant.artifacts.kv import cache_bytes
from sinkquant.cache import SinkCache, attention, cached_logits, load_cache, prepare, save_cache
from sinkquant.errors import RequestError

FAMILIES = ["mistral", "gemma3_text", "gpt_oss"]
TOKENS, WINDOW, SINKS, PADDING = 150, 48, 2, 30


def _inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second with padding on its left."""
    ids = torch.randint(8, 128, (2, tokens), generator=torch.Generator().manual_seed(4))
    real = torch.ones_like(ids)
    real[1, :PADDING] = 0
    return ids * real, real


def _reference(family: str, ids: torch.Tensor, real: torch.Tensor, sinks: bool, **overrides: Any) -> torch.Tensor:
    """Logits of one pass without a cache, every mask written by hand."""
    model = tiny_model(family, **overrides)
    tokens = ids.shape[1]
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    causal = (key <= query)[None] & (real[:, None] > 0)
    place = real.cumsum(1) - 1
    is_sink = (place < SINKS) & (real > 0)
    sliding = causal & ((query - key < WINDOW)[None] | (is_sink[:, None] if sinks else False))
    masks = {kind: torch.zeros(2, 1, tokens, tokens).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
             for kind, seen in (("full_attention", causal), ("sliding_attention", sliding))}
    mixed = len(set(getattr(model.config, "layer_types", None) or [])) > 1
    with torch.no_grad():
        return model(ids, attention_mask=masks if mixed else masks["sliding_attention"],
                     position_ids=place.clamp(min=0), use_cache=False).logits


def _plan(model: PreTrainedModel, bits: int = 16, **settings: Any) -> KVCachePlan:
    return kv_plan(model, bits, sliding=True, **({"window": 8, "exact": "first-n", "first_n": SINKS,
                                                  "sliding_sinks": True} | settings))


def _stream(model: PreTrainedModel, cache: Any, ids: torch.Tensor, real: torch.Tensor, chunks: list[int]
            ) -> torch.Tensor:
    logits, start = [], 0
    place = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for size in chunks:
            end = start + size
            logits.append(model(ids[:, start:end], attention_mask=real[:, :end], position_ids=place[:, start:end],
                                past_key_values=cache).logits)
            start = end
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("window", "chunks"), [(8, [TOKENS]), (8, [100] + [1] * 50), (40, [100] + [1] * 50),
                                                (8, [40, 70] + [8] * 5)],
                         ids=["one pass", "decode", "nothing to pack", "chunks"])
@pytest.mark.parametrize(("family", "attention"), [
    ("mistral", "sdpa"), ("mistral", "eager"), ("gemma3_text", "sdpa"), ("gemma3_text", "eager"), ("gpt_oss", "eager")])
def test_sinks_are_seen_beyond_the_window(family: str, attention: str, window: int, chunks: list[int]) -> None:
    ids, real = _inputs()
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    prepare(model)
    plan = _plan(model, window=window)
    cache = SinkCache(model.config, plan)
    found = _stream(model, cache, ids, real, chunks)
    seen = real > 0
    assert torch.allclose(found[seen], _reference(family, ids, real, True)[seen], atol=2e-5)
    assert not torch.allclose(found[:, -1], _reference(family, ids, real, False)[:, -1], atol=1e-3)
    sliding = [layer for layer in cache.layers if layer.is_sliding]
    assert all(layer.dropped > PADDING + SINKS for layer in sliding)
    assert all(layer.exact_columns.tolist() == [[0, 1], [PADDING, PADDING + 1]] for layer in sliding)
    assert cache.nbytes() == cache_bytes(plan, TOKENS, SINKS, 2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_key_nothing_changes(family: str) -> None:
    ids, real = _inputs()
    model = prepare(tiny_model(family))
    chunks = [100] + [1] * 50
    plain = _stream(model, SinkCache(model.config, _plan(model, sliding_sinks=False)), ids, real, chunks)
    own = _stream(model, DynamicCache(config=model.config), ids, real, chunks)
    seen = real > 0
    for expected in (own, _reference(family, ids, real, False)):
        assert torch.allclose(plain[seen], expected[seen], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_rows_see_what_they_always_saw(family: str) -> None:
    """While no window has left its sinks behind, the two are the same."""
    ids, real = _inputs(WINDOW)
    model = prepare(tiny_model(family))
    logits = [_stream(model, SinkCache(model.config, _plan(model, sliding_sinks=on)), ids, real, [40] + [1] * 8)
              for on in (True, False)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_reads_agree_with_dense_ones(family: str) -> None:
    """Two bits: single tokens read packed blocks, chunks of 17 a dense copy; both see the sinks exactly."""
    ids, real = _inputs(TOKENS + 17)
    model = prepare(tiny_model(family))
    found = [_stream(model, SinkCache(model.config, _plan(model, 2)), ids[:, :TOKENS + new], real[:, :TOKENS + new],
                     [TOKENS, new])[:, TOKENS] for new in (1, 17)]
    assert torch.allclose(*found, atol=2e-4)


def test_generate_crop_and_save(tmp_path: Path) -> None:
    model = prepare(tiny_model("mistral"))
    ids, real = _inputs()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = model.generate(ids[:1], past_key_values=SinkCache(model.config, _plan(model)), **settings)
    assisted = model.generate(ids[:1], past_key_values=SinkCache(model.config, _plan(model)),
                              prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(assisted, expected)
    both = SinkCache(model.config, _plan(model, 2))
    model.generate(ids, attention_mask=real, past_key_values=both, num_beams=2, **settings)
    cache = SinkCache(model.config, _plan(model, 2))
    model.generate(ids[:1], past_key_values=cache, **settings)
    save_cache(cache, tmp_path / "cache.safetensors")
    again = load_cache(model.config, tmp_path / "cache.safetensors")
    assert again.plan.sliding_sinks
    with torch.no_grad():
        logits = [model(ids[:1, :5], past_key_values=one).logits for one in (cache, again)]
    assert torch.equal(*logits)


def test_the_triton_kernel_reads_no_slots() -> None:
    model = prepare(tiny_model("mistral"))
    ids, real = _inputs()
    cache = SinkCache(model.config, _plan(model, 2))
    with mock.patch.object(attention, "kernel_reads", side_effect=AssertionError):
        _stream(model, cache, ids, real, [TOKENS - 3, 1, 1, 1])
    assert all(layer.lengths for layer in cache.layers)


def test_scores_see_the_sinks() -> None:
    model = prepare(tiny_model("mistral"))
    ids, _ = _inputs()
    scored = cached_logits(model, ids, _plan(model))
    assert torch.allclose(scored, _reference("mistral", ids, torch.ones_like(ids), True), atol=2e-5)


def test_what_cannot_see_them_is_refused() -> None:
    model = tiny_model("mistral")
    with pytest.raises(RequestError, match="prepare"):
        model(torch.full((1, 8), 9), past_key_values=SinkCache(model.config, _plan(model)))
    with pytest.raises(RequestError, match="massive"):
        SinkCache(model.config, _plan(model, exact="massive"))
