"""Scores through the cache are those of decoding, and a model with a cache of its own uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import DynamicCache, PreTrainedModel

from sinkquant.cache import SinkCache, cached_logits, install, prepare
from sinkquant.errors import RequestError


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return prepare(tiny_model("llama"))


def _rows(rows: int = 2, length: int = 120) -> torch.Tensor:
    return torch.randint(8, 128, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_everything_exact_is_the_plain_score(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        plain = model(_rows(), use_cache=False).logits
    assert torch.allclose(cached_logits(model, _rows(), kv_plan(model, 16)), plain, atol=1e-5)


def test_scores_are_those_of_decoding(llama: PreTrainedModel) -> None:
    """Chunks of a block are as far from the unquantized scores as token-by-token decoding is."""
    plan = kv_plan(llama, 2, exact="first-n", first_n=1)
    cache = SinkCache(llama.config, plan)
    with torch.no_grad():
        steps = torch.cat([llama(token, past_key_values=cache).logits for token in _rows().split(1, dim=1)], dim=1)
    single = cached_logits(llama, _rows(), plan.model_copy(update={"window": 0}))
    assert single.shape == steps.shape
    chunked = cached_logits(llama, _rows(), plan)
    assert torch.allclose(chunked[:, :64], steps[:, :64], atol=1e-4)
    plain = llama(_rows(), use_cache=False).logits
    distances = [(logits[:, 64:] - plain[:, 64:]).abs().mean() for logits in (steps, chunked)]
    assert 0.5 < distances[1] / distances[0] < 1.5


def test_padding_on_the_right_changes_no_score(llama: PreTrainedModel) -> None:
    plan = kv_plan(llama, 2, exact="first-n", first_n=1)
    rows = _rows()
    padded = torch.cat([rows, torch.zeros(2, 50, dtype=torch.long)], dim=1)
    assert torch.allclose(cached_logits(llama, padded, plan)[:, :120], cached_logits(llama, rows, plan), atol=1e-5)


def test_an_installed_cache_is_used_and_can_be_overruled() -> None:
    model = install(tiny_model("llama"), kv_plan(tiny_model("llama"), 2, exact="first-n", first_n=1))
    plain = tiny_model("llama")
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    rows = {"input_ids": _rows(), "attention_mask": torch.ones(2, 120, dtype=torch.long)}
    found = model.generate(**rows, **settings)
    assert isinstance(found.past_key_values, SinkCache)
    assert found.past_key_values.layers[0].packed_length == 64
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not torch.equal(twin.generate(**rows, **settings).sequences, found.sequences)
    other = model.generate(**rows, past_key_values=DynamicCache(config=model.config), **settings)
    assert isinstance(other.past_key_values, DynamicCache)
    assert torch.equal(other.sequences, plain.generate(**rows, **settings).sequences)
    assert torch.equal(model.generate(**rows, use_cache=False, **settings).sequences, other.sequences)


def test_the_plan_of_another_model_is_refused_at_once(llama: PreTrainedModel) -> None:
    with pytest.raises(RequestError, match="3 layers"):
        install(tiny_model("llama", num_hidden_layers=2), kv_plan(llama))
