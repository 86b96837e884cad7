"""Learned sinks and sliding windows through a packed cache: no virtual column is lost, by padding or by beams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import COPIES, FAMILIES, MIXTURES, tiny_mixture, tiny_model
from kv_plans import kv_plan
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from sinkquant.artifacts.kv import KVSink
from sinkquant.cache import SinkCache, cached_logits, load_cache, prepare, save_cache
from sinkquant.cache.layer import SinkLayer
from sinkquant.errors import RequestError
from sinkquant.models.attention import observed_attention
from sinkquant.models.blocks import kv_layers

IDS = torch.randint(8, 128, (2, 70), generator=torch.Generator().manual_seed(0))


def _gpt_oss(sink: float) -> PreTrainedModel:
    """Layers with and without a sliding window; every head's virtual column has this logit."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(sink)
    return prepare(model)


def _scores(model: PreTrainedModel, beams: int, bits: int | None) -> torch.Tensor:
    """Log-probabilities of every step, one row of two being padded."""
    mask = torch.ones_like(IDS)
    mask[1, :25] = 0
    cache = (DynamicCache(config=model.config) if bits is None else
             SinkCache(model.config, kv_plan(model, bits, sliding=True, window=0, exact="first-n", first_n=1)))
    made = model.generate(IDS, attention_mask=mask, past_key_values=cache, max_new_tokens=12, num_beams=beams,
                          do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0)
    return torch.stack(made.scores).log_softmax(-1)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_virtual_sink_column_is_never_dropped(beams: int) -> None:
    model = _gpt_oss(2.0)
    expected = _scores(model, beams, None)
    torch.testing.assert_close(_scores(model, beams, 16), expected, rtol=1e-4, atol=1e-4)
    packed = (_scores(model, beams, 8) - expected).abs().max()
    without = (_scores(_gpt_oss(-100.0), beams, None) - expected)[0].abs().max()
    assert packed < 0.1 * without


def test_a_cache_of_another_model_or_plan_is_refused(tmp_path: Path) -> None:
    model = prepare(tiny_model("llama"))
    plan = kv_plan(model, 2)
    cache = SinkCache(model.config, plan)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    save_cache(cache, tmp_path / "new" / "cache.safetensors")
    other = tiny_model("llama", num_key_value_heads=4)
    with pytest.raises(RequestError, match="4 KV heads"):
        load_cache(other.config, tmp_path / "new" / "cache.safetensors")
    with pytest.raises(RequestError, match="another plan"):
        load_cache(model.config, tmp_path / "new" / "cache.safetensors", plan=kv_plan(model, 4))
    again = load_cache(model.config, tmp_path / "new" / "cache.safetensors", plan=plan)
    assert again.get_seq_length() == 70


CHANGES_STATES = {
    "diffllama": FAMILIES["llama"] | {"num_key_value_heads": 4}} | COPIES
"""Families that do something else with keys or values before they attend: double them, repeat them."""


@pytest.mark.parametrize("family", CHANGES_STATES)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_a_model_does_to_cached_states_is_done_to_a_dense_copy(family: str, bits: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CHANGES_STATES[family])).eval()
    ids = torch.randint(8, 128, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        prepare(model)
        cache = SinkCache(model.config, kv_plan(model, bits))
        found = [model(part, past_key_values=cache).logits for part in (ids[:, :90], *ids[:, 90:].split(1, dim=1))]
    near = 1e-4 if bits == 16 else 0.02 * plain.abs().max()
    torch.testing.assert_close(torch.cat(found, dim=1), plain, rtol=0, atol=float(near))
    torch.testing.assert_close(cached_logits(model, ids, kv_plan(model, bits)), plain, rtol=0, atol=float(near))


def test_latents_are_no_keys_and_values() -> None:
    """Multi-head latent attention caches what keys and values are made of; a plan of heads would not fit it."""
    assert [layer.heads for layer in kv_layers(tiny_mixture("deepseek_v3").config)] == [0] * 2


@pytest.mark.parametrize("family", ["doge", "gemma3n_text"])
def test_a_layer_that_is_read_twice_packs_once(family: str) -> None:
    """Doge makes its mask of the values first; Gemma 3n hands keys and values on to later layers. A sink that is found
    while decoding keeps one slot."""
    settings = FAMILIES["llama"] | {"num_hidden_layers": 4}
    if family == "gemma3n_text":
        settings |= {"head_dim": 16, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4,
                     "laurel_rank": 8, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
                     "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = prepare(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval())
    ids = torch.randint(8, 128, (1, 150), generator=torch.Generator().manual_seed(1))
    ids[0, 95] = 5
    plan = kv_plan(model, 8, exact="detected", sinks=[KVSink(token_id=5, position=None)])
    cache = SinkCache(model.config, plan)
    with torch.no_grad():
        for part in (ids[:, :90], *ids[:, 90:].split(1, dim=1)):
            model(part, past_key_values=cache)
    layers = [layer for layer in cache.layers if isinstance(layer, SinkLayer) and layer.lengths]
    assert layers
    assert all(layer.exact_columns.tolist() == [[95]] for layer in layers)


def _sharing(kind: str = "gemma3n_text") -> Any:
    """A tiny model whose last two layers read the keys and values of earlier ones, every other layer sliding."""
    settings = FAMILIES["llama"] | {
        "num_hidden_layers": 6 if kind == "gemma4_text" else 4, "head_dim": 16, "num_kv_shared_layers": 2,
        "sliding_window": 100, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
        "max_position_embeddings": 512}
    layers = settings["num_hidden_layers"]
    settings |= {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    settings |= {"global_head_dim": 16} if kind == "gemma4_text" else {
        "laurel_rank": 8, "intermediate_size": [128] * layers, "activation_sparsity_pattern": [0.0] * layers,
        "altup_num_inputs": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


@pytest.mark.parametrize("step", [1, 8])
def test_layers_that_share_a_sliding_layer_read_it_before_it_drops_anything(step: int) -> None:
    model = _sharing()
    ids = torch.randint(8, 128, (1, 230), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        prepare(model)
        cache = SinkCache(model.config, kv_plan(model, 8, sliding=True))
        found = [model(part, past_key_values=cache).logits for part in (ids[:, :90], *ids[:, 90:].split(step, dim=1))]
    assert cache.layers[0].dropped > 0
    torch.testing.assert_close(torch.cat(found, dim=1), plain, rtol=0, atol=0.04)


def test_a_prompt_that_sees_sinks_in_a_shared_sliding_layer_stays_causal() -> None:
    model = prepare(_sharing())
    ids = torch.randint(8, 128, (1, 260), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for last in (3, 99):
            ids[0, -1] = last
            plan = kv_plan(model, 16, sliding=True, exact="first-n", first_n=2, window=8, sliding_sinks=True)
            found.append(model(ids, past_key_values=SinkCache(model.config, plan)).logits[:, :-1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_a_cache_of_shared_layers_is_saved_and_read_back(tmp_path: Path) -> None:
    model = prepare(_sharing())
    ids = torch.randint(8, 128, (1, 170), generator=torch.Generator().manual_seed(1))
    cache = SinkCache(model.config, kv_plan(model, 8, sliding=True))
    with torch.no_grad():
        model(ids[:, :160], past_key_values=cache)
        save_cache(cache, tmp_path / "cache")
        again = load_cache(model.config, tmp_path / "cache")
        assert torch.equal(model(ids[:, 160:], past_key_values=again).logits,
                           model(ids[:, 160:], past_key_values=cache).logits)


def test_the_last_logits_of_gemma_4_stay_causal() -> None:
    """Its shared layers are given the last queries alone, without a mask, where attention has a name of its own."""
    model = _sharing("gemma4_text")
    ids = torch.randint(8, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids, logits_to_keep=4).logits
        torch.testing.assert_close(prepare(model)(ids, logits_to_keep=4).logits, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
def test_a_prepared_model_reads_a_static_cache_as_before(family: str) -> None:
    """sdpa takes no mask for its empty columns, which stand behind the prompt."""
    ids = torch.randint(8, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    model = _sharing(family) if family == "gemma4_text" else tiny_model(family)
    with torch.no_grad():
        plain = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=48)).logits
        prepare(model)
        found = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=48)).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


def test_queries_that_pick_their_keys_are_read_as_the_model_reads_them() -> None:
    """DeepSeek 3.2 masks what its indexer leaves out under the names sdpa and eager alone."""
    settings = MIXTURES["deepseek_v3"] | {"index_topk": 8, "index_n_heads": 4, "index_head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v32", **settings)).eval()
    ids = torch.randint(8, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(prepare(model)(ids).logits, plain)
        with observed_attention(model), pytest.raises(RequestError, match="picks 8 keys for every query"):
            model(ids)
        with observed_attention(model):  # as many keys as there are: nothing is left out
            torch.testing.assert_close(model(ids[:, :8]).logits, plain[:, :8], rtol=0, atol=1e-4)


def test_keys_and_values_of_other_widths_are_planned_as_they_are() -> None:
    config = AutoConfig.for_model("mimo_v2_flash", head_dim=24, v_head_dim=16, num_attention_heads=4,
                                  num_key_value_heads=2, num_hidden_layers=2, hidden_size=64)
    assert [(layer.key_dim, layer.value_dim) for layer in kv_layers(config)] == [(24, 16)] * 2
