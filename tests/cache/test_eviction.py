"""Sinks, window and a bounded middle: an endless stream in fixed memory, positions as in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from kv_plans import kv_plan
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts.kv import cache_bytes
from sinkquant.cache import SinkCache, install, load_cache, prepare, save_cache
from sinkquant.cache.rotary import require_rotary, rotary_of
from sinkquant.errors import RequestError

TOKENS = 230


def _row(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(8, 128, (1, tokens), generator=torch.Generator().manual_seed(2))


def _stream(model: PreTrainedModel, cache: SinkCache, ids: torch.Tensor, chunk: int = 1) -> torch.Tensor:
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            logits = model(part, past_key_values=cache).logits
    return logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize(("evict", "chunk"), [(0, 1), (64, 1), (64, 20)])
def test_positions_are_as_in_the_cache(family: str, evict: int, chunk: int) -> None:
    """In a model of one layer, keys depend on nothing but token and position, so that a fresh row of the sinks and of
    what is left must give the same logits."""
    model = prepare(tiny_model(family, num_hidden_layers=1))
    cache = SinkCache(model.config, kv_plan(model, 16, exact="first-n", first_n=3, evict=evict))
    found = _stream(model, cache, _row(), chunk)
    layer = cache.layers[0]
    assert layer.dropped > 0
    # What the last token saw: the state before its own settling, which can have dropped one block more.
    twin = SinkCache(model.config, cache.plan)
    ids = _row()
    last = TOKENS - (TOKENS - 1) % chunk - 1 if chunk > 1 else TOKENS - 1
    _stream(model, twin, ids[:, :last], chunk)
    left = torch.cat([ids[:, :3], ids[:, twin.layers[0].dropped:]], dim=1)
    with torch.no_grad():
        expected = tiny_model(family, num_hidden_layers=1)(left).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 16])
def test_memory_stays_fixed(bits: int) -> None:
    model = prepare(tiny_model("llama"))
    plan = kv_plan(model, bits, exact="first-n", first_n=2, evict=64)
    cache = SinkCache(model.config, plan)
    sizes = set()
    for length in range(10):
        _stream(model, cache, _row(32))
        held = cache.nbytes()
        assert held == cache_bytes(plan, 32 * (length + 1), 2, 1, 4)
        if length > 5:
            sizes.add(held)
    assert len(sizes) == 1
    assert cache.get_seq_length() == 320


def test_the_middle_is_packed_and_read_packed() -> None:
    """A stream that is read packed gives what the same stream gives when it is read dense."""
    plan_of = kv_plan(tiny_model("llama"), 2, exact="first-n", first_n=2, evict=64)
    fast, slow = prepare(tiny_model("llama")), prepare(tiny_model("llama"))
    slow.set_attn_implementation("sdpa")
    caches = [SinkCache(model.config, plan_of) for model in (fast, slow)]
    found, expected = (_stream(model, cache, _row()) for model, cache in zip((fast, slow), caches, strict=True))
    assert caches[0].layers[0].dropped > 0
    assert torch.allclose(found, expected, atol=2e-4)


def test_generate_save_and_crop(tmp_path: Path) -> None:
    model = prepare(tiny_model("llama"))
    plan = kv_plan(model, 2, exact="first-n", first_n=2, evict=32)
    cache = SinkCache(model.config, plan)
    model.generate(_row(200), past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    save_cache(cache, tmp_path / "cache.safetensors")
    again = load_cache(model.config, tmp_path / "cache.safetensors")
    more = _row(40)
    assert torch.equal(_stream(model, again, more, 5), _stream(model, cache, more, 5))
    cache.crop(-20)
    assert cache.get_seq_length() == 229 + 40 - 20
    with pytest.raises(RequestError, match="dropped"):
        cache.crop(-200)


def test_what_cannot_stream_is_refused() -> None:
    gpt2 = prepare(tiny_model("gpt2"))
    with pytest.raises(RequestError, match="rotary"):
        _stream(gpt2, SinkCache(gpt2.config, kv_plan(gpt2, 2, evict=32)), _row(8))
    plain = tiny_model("llama")
    with pytest.raises(RequestError, match="prepare"):
        _stream(plain, SinkCache(plain.config, kv_plan(plain, 2, evict=32)), _row(8))
    assert len(rotary_of(tiny_model("gpt_neox")).frequencies) == 2


@pytest.mark.filterwarnings("ignore")  # transformers names kernels that are not installed
def test_a_hybrid_rotates_where_it_attends() -> None:
    """Convolutions and linear attention keep no keys to be moved."""
    config = AutoConfig.for_model("lfm2", **FAMILIES["qwen3"] | {"layer_types": ["conv", "full_attention", "conv"]})
    rotary_of(AutoModelForCausalLM.from_config(config).eval())


def test_layers_without_positions_are_refused() -> None:
    """SmolLM3 rotates three layers of four: moving a sink of the fourth would turn what was never turned."""
    config = AutoConfig.for_model("smollm3", **FAMILIES["llama"] | {"no_rope_layers": [1, 0, 1]})
    model = prepare(AutoModelForCausalLM.from_config(config).eval())
    for asked in (rotary_of, require_rotary, lambda model: install(model, kv_plan(model, 2, evict=32))):
        with pytest.raises(RequestError, match="some layers of SmolLM3ForCausalLM have none"):
            asked(model)
    require_rotary(tiny_model("llama"))
