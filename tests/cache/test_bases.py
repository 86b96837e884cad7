"""Matrices found on calibration text: what they are of, how they travel with a checkpoint, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from small_runs import model_folder, small_recipe
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import Bases, SinkCache, find_bases, install, load_bases, prepare, save_bases
from sinkquant.cache.bases import _Moments
from sinkquant.errors import RequestError
from sinkquant.formats import bases_of
from sinkquant.models import Decoder, Walk, attention
from sinkquant.models.attention import AttentionRecord, AttentionRows, observed_attention

ROWS = torch.randint(8, 128, (6, 90), generator=torch.Generator().manual_seed(0))


def _plan(model: PreTrainedModel, bits: int = 8, **settings: object) -> KVCachePlan:
    return kv_plan(model, bits, rotate="covariance", exact="first-n", first_n=1, **settings)


def _found(model: PreTrainedModel, plan: KVCachePlan) -> Bases:
    return find_bases(Walk(Decoder.of(model), ROWS, 4), plan)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "jetmoe"])
def test_decoding_computes_what_it_did(family: str) -> None:
    """Two rows, one of them padded; keys and values of 8 bits lose next to nothing, whatever they are rotated by."""
    model = tiny_model(family)
    plan = _plan(model, sliding=True)
    bases = _found(model, plan)
    assert all(basis.matrix.shape == (2, 16, 16) for layer in bases.layers.values()
               for basis in (layer.keys, layer.values) if basis is not None)
    prepare(model, bases=bases)
    ids, mask = ROWS[:2], torch.ones(2, 90, dtype=torch.long)
    mask[1, :20] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    cache, found = SinkCache(model.config, plan), []
    for start in range(0, 90, 10):
        stop = start + 10
        found.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=places[:, start:stop],
                           past_key_values=cache).logits)
    difference = (torch.cat(found, 1) - whole)[:, 80:].abs().max()
    assert 0 < difference < 0.02 * whole.abs().max()


def test_balanced_keys_and_queries_are_those_of_the_text_without_its_sinks() -> None:
    """Queries weighted by what an error of their scores does to their output, found by trying one, and all alike."""
    model = tiny_model("llama")
    bases = _found(model, _plan(model))
    moments: list[torch.Tensor] = []

    class Looks:
        def attention(self, record: AttentionRecord) -> None:
            if record.layer == 1:
                basis = bases.layers[1].keys
                assert basis is not None
                keys, queries = record.key.double()[:, :, 1:], record.query.double()[:, :, 1:]
                # Of whole blocks of 32 and what is left, the first without its sink.
                keys = torch.cat([part - part.mean(2, keepdim=True) for part in keys.split([31, 32, 26], dim=2)], 2)
                weighed = queries * _shift(record)[:, :, 1:]
                asked = [some.unflatten(1, (2, -1)).flatten(2, 3) for some in (weighed, queries)]
                moments.append(_moment(basis.into(keys)))
                moments.append(sum(_moment(basis.query(some)) / some.square().sum((0, 2, 3))[:, None, None]
                                   for some in asked))

    with torch.no_grad(), observed_attention(model, [Looks()]):
        model(ROWS, use_cache=False)
    assert torch.allclose(*moments, rtol=0.05, atol=0.02 * float(moments[0].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_chunk_of_queries_at_a_time_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what no query of a chunk sees is not kept."""
    model = tiny_model(family)
    plan, kept = _plan(model, sliding=True), []
    whole, see = _found(model, plan), _Moments.attention_rows

    def watched(self: _Moments, rows: AttentionRows) -> None:
        see(self, rows)
        kept.append(self.chunks[-1][1].shape[2:])

    monkeypatch.setattr(_Moments, "attention_rows", watched)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 32)
    for index, layer in _found(model, plan).layers.items():
        for mine, its in ((layer.keys, whole.layers[index].keys), (layer.values, whole.layers[index].values)):
            assert mine is not None
            assert its is not None
            torch.testing.assert_close(mine.matrix, its.matrix, rtol=1e-3, atol=1e-4)
    assert set(kept) == {(32, 32), (32, 64), (26, 90)}


def _moment(states: torch.Tensor) -> torch.Tensor:
    flattened = states.double().transpose(0, 1).flatten(1, 2)
    return flattened.mT @ flattened


def _shift(record: AttentionRecord) -> torch.Tensor:
    """Root of the mean squared change of every query's output, per unit of independent errors of its scores on all
    tokens but the first, [batch, heads, length, 1]: derivatives one by one, in float64."""
    keys, values = (states.double().repeat_interleave(2, dim=1) for states in (record.key, record.value))
    scores = record.query.double() @ keys.mT * record.scale
    length = scores.shape[-1]
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    total, small = torch.zeros(*scores.shape[:3], 1, dtype=torch.float64), 1e-4
    for token in range(1, length):
        moved = scores.clone()
        moved[..., token] += small
        total += ((moved.softmax(-1) - scores.softmax(-1)) @ values / small).square().sum(-1, keepdim=True)
    return total.sqrt()


def test_they_are_written_and_read_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made = _found(model, _plan(model))
    save_bases(made, tmp_path / "bases.safetensors")
    again = load_bases(tmp_path / "bases.safetensors")
    assert again.model == made.model
    for index, layer in made.layers.items():
        for mine, its in ((layer.keys, again.layers[index].keys), (layer.values, again.layers[index].values)):
            assert mine is not None
            assert its is not None
            assert torch.equal(mine.matrix, its.matrix)
            assert torch.equal(mine.inverse, its.inverse)
    with pytest.raises(RequestError, match="no KV bases"):
        load_bases(tmp_path / "none")


def test_what_is_missing_or_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    plan = _plan(model)
    with pytest.raises(RequestError, match="found on calibration text"):
        install(copy.deepcopy(model), plan)
    with pytest.raises(RequestError, match="was not given"), torch.no_grad():
        prepare(model)(ROWS, past_key_values=SinkCache(model.config, plan))
    other = tiny_model("llama")
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(RequestError, match="another model"):
        prepare(other, bases=_found(model, plan))


def test_a_checkpoint_brings_its_own(tmp_path: Path, text_file: Path) -> None:
    """Run, and step by step in Python: the same matrices, and generation through them; the values' rotation that the
    weights went through before is in them."""
    folder = model_folder(tmp_path / "in", "llama", num_hidden_layers=2)
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.method=rtn", "weights.rotate=values",
                          "kv_cache={window: 0, group_size: 32, rotate: covariance, clip: both}")
    sq.run(recipe, folder, tmp_path / "out")
    made = bases_of(tmp_path / "out" / "model")
    assert made is not None
    model, tokenizer = sq.load(folder)
    sq.quantize(model, sq.Plan.load(tmp_path / "out" / "plan.json"), tokenizer, device="cpu")
    sq.save(model, tokenizer, tmp_path / "steps")
    again = bases_of(tmp_path / "steps")
    assert again is not None
    for index, layer in made.layers.items():
        assert layer.values is not None
        assert torch.equal(layer.values.matrix, again.layers[index].values.matrix)  # type: ignore[union-attr]
    loaded, _ = sq.load(tmp_path / "steps")
    written = loaded.generate(ROWS[:2, :60], max_new_tokens=8, do_sample=False)
    assert written.shape == (2, 68)


def test_a_checkpoint_takes_its_own_whatever_its_embedding_was_rounded_to(tmp_path: Path, text_file: Path) -> None:
    """Or wherever it was sent."""
    folder = model_folder(tmp_path / "in", "llama", num_hidden_layers=2)
    recipe = small_recipe(text_file, "evaluate.skip=true", "weights.method=rtn",
                          "kv_cache={window: 0, group_size: 32, rotate: covariance, prefix: bos}")
    sq.run(recipe, folder, tmp_path / "out")
    out, where = tmp_path / "out" / "model", {"": "cpu", "model.embed_tokens": "disk"}
    for settings in ({"head_bits": 8}, {"device_map": where, "offload_folder": tmp_path / "offload"}):
        model = sq.load(out, packed=True, **settings)[0]  # type: ignore[arg-type]
        assert model.generate(ROWS[:2, :60], max_new_tokens=4, do_sample=False).shape == (2, 64)
