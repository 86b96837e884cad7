"""The attention observer against transformers' own eager attention, and against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText

from sinkquant.errors import RequestError
from sinkquant.models import AttentionRecord, observed_attention

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH = 150
"""More than one chunk of queries, and more than the sliding windows of the families."""


class Recorder:
    def __init__(self) -> None:
        self.records: list[AttentionRecord] = []

    def attention(self, record: AttentionRecord) -> None:
        self.records.append(record)


def rows(count: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(8, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_records_and_logits_equal_eager_attention(family: str) -> None:
    model = tiny_model(family, initializer_range=0.2)
    batch, recorder = rows(), Recorder()
    with torch.no_grad(), observed_attention(model, [recorder]):
        logits = model(batch, use_cache=False).logits
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(batch, use_cache=False, output_attentions=True)
    assert torch.allclose(logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert [record.layer for record in recorder.records] == list(range(len(expected.attentions)))
    for record, attention in zip(recorder.records, expected.attentions, strict=True):
        assert torch.allclose(record.received, attention.sum(2), rtol=1e-4, atol=1e-4)
        assert torch.allclose(record.learned, (1 - attention.sum(-1)).sum(-1), atol=2e-4)
        groups = attention.shape[1] // record.value.shape[1]
        values = record.value.repeat_interleave(groups, dim=1)
        assert torch.allclose(record.output, attention @ values, rtol=1e-4, atol=1e-4)
        seen = attention[0, 0] > 0
        assert torch.equal(record.visible, seen.sum(0))
        even = (seen / seen.sum(-1, keepdim=True)).sum(0)
        assert torch.allclose(record.uniform, even, rtol=1e-5)
        assert record.has_learned_sink == (family == "gpt_oss")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_records_equal_the_formula_in_float64(family: str) -> None:
    """Grouped queries, a sliding window, soft-capping and a learned sink, each written out."""
    model = tiny_model(family, initializer_range=0.3)
    config, recorder = model.config, Recorder()
    with torch.no_grad(), observed_attention(model, [recorder]):
        model(rows(), use_cache=False)
    for record in recorder.records:
        query, key, value = (tensor.double() for tensor in (record.query, record.key, record.value))
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        logits = query @ key.mT / 16**0.5
        if family == "gemma2":
            logits = config.attn_logit_softcapping * torch.tanh(logits / config.attn_logit_softcapping)
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        kinds = getattr(config, "layer_types", None)
        local = family == "mistral" or (kinds is not None and kinds[record.layer] == "sliding_attention")
        weights = logits.exp() * ((distance >= 0) & (distance < (48 if local else LENGTH)))
        total = weights.sum(-1, keepdim=True)
        if family == "gpt_oss":
            total = total + model.model.layers[record.layer].self_attn.sinks.detach().double().exp()[:, None, None]
        attention = weights / total
        assert torch.allclose(record.received.double(), attention.sum(2), rtol=1e-5, atol=1e-5)
        assert torch.allclose(record.learned.double(), (1 - attention.sum(-1)).sum(-1), rtol=1e-5, atol=1e-4)
        assert torch.allclose(record.output.double(), attention @ value, rtol=1e-4, atol=1e-5)


def test_sliding_windows_hide_the_far_past() -> None:
    model, recorder = tiny_model("mistral"), Recorder()
    with torch.no_grad(), observed_attention(model, [recorder]):
        model(rows(), use_cache=False)
    assert recorder.records[0].visible[:3].tolist() == [48, 48, 48]


def test_a_learned_sink_takes_its_share() -> None:
    model, recorder = tiny_model("gpt_oss"), Recorder()
    for block in model.model.layers:
        block.self_attn.sinks.data[:] = torch.tensor([-50.0, 50.0, 0.0, 0.0])
    with torch.no_grad(), observed_attention(model, [recorder]):
        model(rows(), use_cache=False)
    share = recorder.records[1].learned[0] / LENGTH
    assert float(share[0]) == pytest.approx(0, abs=1e-6)
    assert float(share[1]) == pytest.approx(1, abs=1e-6)
    assert 0 < float(share[2]) < 0.5


def test_the_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(IndexError), observed_attention(model, [Recorder()]):
        model(torch.full((1, 4), VOCABULARY))
    assert model.config._attn_implementation == before


def test_every_part_gets_its_own_attention_back() -> None:
    """Towers for images have other attention than the text part."""
    config = AutoConfig.for_model("paligemma", text_config=SMALL | {"model_type": "gemma2"}, projection_dim=64,
                                  vision_config=SMALL | {"model_type": "siglip_vision_model", "image_size": 28,
                                                         "patch_size": 14})
    model = AutoModelForImageTextToText.from_config(config)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    for part, own in zip(parts, ("sdpa", "eager", "sdpa"), strict=True):
        part._attn_implementation_internal = own
    with observed_attention(model):
        assert len({part._attn_implementation for part in parts}) == 1
    assert [part._attn_implementation for part in parts] == ["sdpa", "eager", "sdpa"]


def test_without_observers_the_logits_are_the_same() -> None:
    model, batch = tiny_model("gemma2", initializer_range=0.2), rows()
    with torch.no_grad():
        with observed_attention(model):
            plain = model(batch, use_cache=False).logits
        with observed_attention(model, [Recorder()]):
            watched = model(batch, use_cache=False).logits
    assert torch.allclose(plain, watched, rtol=1e-4, atol=1e-5)


def test_half_precision_is_accumulated_in_float32() -> None:
    model, recorder = tiny_model("llama", dtype=torch.bfloat16), Recorder()
    with torch.no_grad(), observed_attention(model, [recorder]):
        model(rows(), use_cache=False)
    for record in recorder.records:
        assert record.received.dtype == torch.float32
        assert torch.allclose(record.received.sum(-1), torch.full((2, 4), float(LENGTH)), rtol=1e-4)


def test_a_cache_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), observed_attention(model, [Recorder()]):
        cache = model(rows(1, 20), use_cache=True).past_key_values
        with pytest.raises(RequestError, match="without a KV cache"):
            model(rows(1, 4), past_key_values=cache)
