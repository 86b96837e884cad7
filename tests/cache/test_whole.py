"""Rows read in one pass have the logits of the same rows read in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan, KVSink, MassiveCarriers
from sinkquant.cache import SinkCache, cached_logits, make_prefix, prepare
from sinkquant.cache.chunked import chunk_length
from sinkquant.cache.whole import reads_whole

LENGTH = 150
SINKS = [KVSink(token_id=None, position=0), KVSink(token_id=9, position=None)]


def _rows() -> torch.Tensor:
    rows = torch.randint(8, 128, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    rows[:, 0], rows[0, 40], rows[1, 70], rows[1, 77] = 1, 9, 9, 9
    return rows


def _in_chunks(model: PreTrainedModel, rows: torch.Tensor, plan: KVCachePlan) -> torch.Tensor:
    cache = SinkCache(model.config, plan)
    with torch.no_grad():
        return torch.cat([model(chunk, past_key_values=cache, use_cache=True).logits
                          for chunk in rows.split(chunk_length(plan), dim=1)], dim=1)


def _passes(model: PreTrainedModel) -> list[int]:
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, args, _k: sizes.append(args[0].shape[1]), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("settings", [
    {"exact": "detected", "sinks": SINKS}, {"exact": "first-n", "first_n": 3, "symmetric": True},
    {"exact": "none", "window": 20, "rotate": True}], ids=["detected", "first-n", "rotated"])
def test_one_pass_gives_the_logits_of_chunks(family: str, settings: dict[str, Any]) -> None:
    # float64: a last bit could tip a code of two bits. Fused experts have no kernel for it.
    dtype = torch.float32 if family == "gpt_oss" else torch.float64
    model = prepare(tiny_model(family, initializer_range=0.2, dtype=dtype))
    plan = kv_plan(model, 2, sliding=True, **settings)
    expected = _in_chunks(model, _rows(), plan)
    sizes = _passes(model)
    found = cached_logits(model, _rows(), plan)
    assert sizes == [LENGTH]
    assert torch.allclose(found, expected, atol=1e-4)
    with torch.no_grad():
        plain = model(_rows(), use_cache=False).logits
    # What packing changes is no rounding: a pass that saw it too late would be told from this one.
    assert (plain - expected).abs().max() > 100 * (found - expected).abs().max()


def test_heads_of_several_widths_and_slots_that_run_out() -> None:
    model = prepare(tiny_model("llama", initializer_range=0.2))
    plan = kv_plan(model, 2, exact="first-n", first_n=6, max_exact=4)
    layers = [layer.model_copy(update={"key_bits": [2, 4], "value_bits": [16, 3]}) for layer in plan.layers]
    plan = plan.model_copy(update={"layers": layers})
    assert torch.allclose(cached_logits(model, _rows(), plan), _in_chunks(model, _rows(), plan), atol=2e-4)


def test_a_prefix_is_put_into_the_pass() -> None:
    original, model = tiny_model("llama"), tiny_model("llama", seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(original.get_input_embeddings().weight)
    prepare(model, make_prefix(original, [1, 20]))
    rows = _rows()
    rows[:2, 1] = 20
    plan = kv_plan(model, 2, prefix=[1, 20])
    found = cached_logits(model, rows, plan)
    assert torch.allclose(found, _in_chunks(model, rows, plan), atol=1e-5)
    assert not torch.allclose(found, cached_logits(tiny_model("llama", seed=3), rows, kv_plan(model, 2)), atol=1e-3)


@pytest.mark.parametrize("settings", [
    {"evict": 32}, {"exact": "massive", "massive": MassiveCarriers(layer=0, channels=[3], thresholds=[0.01])},
    {"exact": "first-n", "first_n": 2, "sliding_sinks": True}], ids=["evict", "massive", "sliding-sinks"])
def test_what_one_pass_cannot_show_is_read_in_chunks(settings: dict[str, Any]) -> None:
    model = prepare(tiny_model("mistral", initializer_range=0.2))
    plan = kv_plan(model, 2, sliding=True, **settings)
    assert not reads_whole(model, plan)
    sizes = _passes(model)
    found = cached_logits(model, _rows(), plan)
    assert sizes == [32, 32, 32, 32, 22]
    assert torch.equal(found, _in_chunks(model, _rows(), plan))
