"""What the caller asks for happens; what only a configuration names is no wish of the caller's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextGenerationPipeline

from sinkquant.cache import SinkCache, install
from sinkquant.errors import RequestError

IDS = torch.randint(8, 128, (1, 80), generator=torch.Generator().manual_seed(3))


def installed(family: str = "llama", **generation: Any) -> PreTrainedModel:
    model = tiny_model(family)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return install(model, kv_plan(model))


def cache_of(model: Any, *args: Any, **kwargs: Any) -> object:
    """What kind of cache a call of generate has used."""
    settings = {"max_new_tokens": 2, "return_dict_in_generate": True} if len(args) < 1 else {}
    kwargs.setdefault("attention_mask", torch.ones_like(IDS))
    return type(model.generate(IDS, *args, **kwargs, **settings).past_key_values)


def own(**settings: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=2, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("named", ["hybrid", "static", "dynamic", "quantized"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_that_the_configuration_names_is_set_aside(family: str, named: str) -> None:
    model = installed(family, cache_implementation=named, use_cache=False)
    assert cache_of(model) is SinkCache
    assert cache_of(model, own(cache_implementation=named)) is SinkCache  # read from the same file, then
    assert cache_of(model, past_key_values=None, use_cache=None, cache_implementation=None) is SinkCache


@pytest.mark.parametrize("given", [{}, {"past_key_values": None}, {"use_cache": True}, {"generation_config": None}])
def test_a_call_that_asks_for_no_other_cache_is_packed(given: dict[str, Any]) -> None:
    assert cache_of(installed(), **given) is SinkCache
    assert cache_of(copy.deepcopy(installed()), **given) is SinkCache
    assert cache_of(installed(), own()) is SinkCache


def test_a_call_that_asks_for_another_cache_gets_it() -> None:
    model = installed()
    assert cache_of(model, past_key_values=DynamicCache(config=model.config)) is DynamicCache
    assert cache_of(model, cache_implementation="dynamic") is DynamicCache
    assert cache_of(model, own(cache_implementation="dynamic")) is DynamicCache
    assert cache_of(model, use_cache=False) is type(None)
    assert cache_of(model, own(use_cache=False)) is type(None)
    model.generation_config.cache_implementation = "dynamic"  # set by the caller, after loading
    assert cache_of(model) is DynamicCache


def test_compiled_and_wrapped_models_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = installed(), []
    monkeypatch.setattr(SinkCache, "see", lambda *a, see=SinkCache.see, **k: (used.append(1), see(*a, **k))[1])
    pipeline = TextGenerationPipeline(model=model, tokenizer=tiny_tokenizer())
    plain = TextGenerationPipeline(model=install(tiny_model("llama"), kv_plan(model, 16)), tokenizer=tiny_tokenizer())
    text = random_text(60)
    for one in (pipeline, plain):
        before = len(used)
        assert one(text, max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith(text)
        assert len(used) > before
    assert cache_of(torch.compile(model, backend="eager")) is SinkCache


def test_pages_of_their_own_are_refused() -> None:
    with pytest.raises(RequestError, match="continuous batching keeps keys and values in pages of its own"):
        installed().generate_batch([IDS[0].tolist()])


def test_a_model_drafts_with_its_first_layers() -> None:
    model, drafts = installed(), {"max_new_tokens": 6, "do_sample": False, "assistant_early_exit": 1}
    model.generation_config.eos_token_id = None
    plain = model.generate(IDS[:, :20], max_new_tokens=6, do_sample=False)  # so short that nothing is packed
    assert torch.equal(model.generate(IDS[:, :20], **drafts), plain)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("sliding", [True, False])
def test_an_assistant_takes_back_what_was_rejected_beyond_its_window(sliding: bool) -> None:
    helper, model = tiny_model("gemma3_text"), tiny_model("gemma3_text", seed=1)
    install(helper, kv_plan(helper, 8, sliding=sliding))
    for one in (helper, model):
        one.generation_config.eos_token_id, one.generation_config.pad_token_id = None, 0
    ids = torch.cat([IDS, IDS.flip(1)], dim=1)[:, :100]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=helper), plain)
