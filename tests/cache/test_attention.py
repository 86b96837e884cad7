"""Reading packed blocks gives what a dense copy gives, to float32, whatever the model asks of attention."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan

from sinkquant.cache import SinkCache, attention, prepare
from sinkquant.cache.attention import attend
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.read_torch import TorchReads
from sinkquant.cache.transforms.recoding import LayerBases
from sinkquant.cache.transforms.rotation import Basis
from sinkquant.models import Decoder

WIDTH, HEADS, KV_HEADS, COLUMNS = 16, 4, 2, 150


def _layer(symmetric: bool = False, rotate: bool | str = False, key_bits: tuple[int, int] = (2, 2),
           value_bits: tuple[int, int] = (2, 2), new: int = 1, **settings: object) -> tuple[SinkLayer, torch.Tensor]:
    plan = kv_plan(tiny_model("llama"), symmetric=symmetric, rotate=rotate, exact="first-n", **settings)
    one = plan.layers[0].model_copy(update={"key_bits": list(key_bits), "value_bits": list(value_bits)})
    layer = SinkLayer(plan.model_copy(update={"layers": [one]}), 0)
    generator = torch.Generator().manual_seed(0)
    if rotate == "covariance":
        keys, values = (Basis.of_matrix(
            torch.eye(WIDTH) + 0.1 * torch.randn(KV_HEADS, WIDTH, WIDTH, generator=generator)) for _ in range(2))
        layer.take_bases(LayerBases(keys, values))
    layer.append(*(torch.randn(2, KV_HEADS, COLUMNS - new, WIDTH, generator=generator) + 1 for _ in range(2)))
    flags = torch.zeros(2, COLUMNS - new, dtype=torch.bool)
    flags[0, 3] = flags[1, 40] = flags[1, 140] = True
    layer.peel(flags)
    layer.settle()
    layer.append(*(torch.randn(2, KV_HEADS, new, WIDTH, generator=generator) for _ in range(2)))
    return layer, torch.randn(2, HEADS, new, WIDTH, generator=generator)


def _reference(layer: SinkLayer, query: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float | None = None,
               learned: torch.Tensor | None = None) -> torch.Tensor:
    keys, values = (states.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for states in layer.dense())
    scores = query.double() @ keys.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if learned is not None:
        column = learned.double().reshape(1, -1, 1, 1).expand(2, HEADS, query.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : values.shape[2]]
    return (weights @ values).transpose(1, 2)


@pytest.fixture(params=["this machine", "torch"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine reads packed blocks with, then torch, which reads them on any."""
    if request.param == "torch":
        monkeypatch.setattr(attention, "reads_on", lambda device: TorchReads())


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("settings", [
    {}, {"symmetric": True}, {"rotate": True}, {"key_bits": (3, 3), "value_bits": (8, 8)},
    {"key_bits": (4, 2), "value_bits": (2, 16)}, {"key_bits": (16, 2), "rotate": True},
    {"rotate": "covariance", "key_bits": (4, 2), "scale_tokens": True}, {"rotate_values": "hadamard", "clip": "both"},
    {"scale_bits": 8, "rotate": True}, {"scale_bits": 8, "symmetric": True, "value_bits": (3, 4)}],
    ids=str)
@pytest.mark.parametrize("new", [1, 5])
def test_packed_reading_is_dense_reading(settings: dict[str, object], new: int) -> None:
    layer, query = _layer(new=new, **settings)  # type: ignore[arg-type]
    causal = torch.ones(new, COLUMNS, dtype=torch.bool).tril(COLUMNS - new)[None, None]
    padded = causal.expand(2, 1, new, COLUMNS).clone()
    padded[1, :, :, :30] = False
    for mask, seen in ((None, causal), (padded, padded), (padded.float().log(), padded)):
        found = attend(layer, query, mask, 0.25)
        assert torch.allclose(found.double(), _reference(layer, query, seen, 0.25), atol=2e-5)


@pytest.mark.usefixtures("reads")
def test_soft_caps_learned_columns_and_cut_blocks() -> None:
    learned = torch.tensor([3.0, -1.0, 9.0, 0.5])
    layer, query = _layer()
    causal = torch.ones(1, COLUMNS, dtype=torch.bool)[None, None]
    found = attend(layer, query, None, 0.25, 4.0, learned)
    assert torch.allclose(found.double(), _reference(layer, query, causal, 0.25, 4.0, learned), atol=2e-5)
    layer.crop(-100)
    layer.append(*(torch.randn(2, KV_HEADS, 70, WIDTH) for _ in range(2)))
    layer.settle()
    assert 18 in layer.lengths
    found = attend(layer, query, None, 0.25)
    assert torch.allclose(found.double(), _reference(layer, query, causal[..., :120], 0.25), atol=2e-5)


def test_large_scores_stay_finite() -> None:
    layer, query = _layer()
    found = attend(layer, 1e4 * query, None, 1.0)
    assert torch.isfinite(found).all()
    causal = torch.ones(1, COLUMNS, dtype=torch.bool)[None, None]
    assert torch.allclose(found.double(), _reference(layer, 1e4 * query, causal, 1.0), atol=1e-3)


@pytest.mark.parametrize("chunk", [10, 25])
def test_short_chunks_of_long_padding_leave_the_row_alone(chunk: int) -> None:
    """A query of padding sees nothing; what it gives must not reach the row that follows."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(8, 128, (2, 150), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, :100] = 0
    places = (real.cumsum(1) - 1).clamp(min=0)
    cache = SinkCache(model.config, kv_plan(model, 16, 8, exact="first-n", first_n=1))
    with torch.no_grad():
        found = [model(ids[:, end - chunk:end], attention_mask=real[:, :end], position_ids=places[:, end - chunk:end],
                       past_key_values=cache).logits for end in range(chunk, 151, chunk)]
        expected = model(ids[1:, 100:]).logits
    assert torch.allclose(torch.cat(found, 1)[1:, 100:], expected, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "gpt_neox", "qwen3_moe"])
def test_a_prepared_model_decodes_as_an_unprepared_one(family: str) -> None:
    model, plain = prepare(tiny_model(family)), tiny_model(family)
    row = torch.randint(8, 128, (1, 120), generator=torch.Generator().manual_seed(1))
    caches = [SinkCache(model.config, kv_plan(model, 2, exact="first-n", first_n=1)) for _ in range(2)]
    with torch.no_grad():
        for one, cache in zip((model, plain), caches, strict=True):
            one(row[:, :90], past_key_values=cache)
        for start in range(90, 120, 3):
            found, expected = (one(row[:, start:start + 3], past_key_values=cache).logits
                               for one, cache in zip((model, plain), caches, strict=True))
            assert torch.allclose(found, expected, atol=2e-5)
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.get_seq_length() == other.get_seq_length() == 120


def test_without_our_cache_a_prepared_model_is_as_before() -> None:
    for family in ("llama", "gpt_oss"):
        model, plain = prepare(tiny_model(family)), tiny_model(family)
        row = torch.arange(10, 60)[None]
        with torch.no_grad():
            assert torch.equal(model(row).logits, plain(row).logits)
        assert prepare(model) is model
        assert len(model._forward_pre_hooks) == 1
        assert len(Decoder.of(model).blocks[0]._forward_hooks) == 1
