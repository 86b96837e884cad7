"""A prefix from the unquantized model: restored bit by bit, in its rows only, with masks and positions untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from sinkquant.cache import (
    SinkCache,
    cached_logits,
    find_prefix,
    install,
    load_cache,
    load_prefix,
    make_prefix,
    prepare,
    put_in_front,
    save_cache,
    save_prefix,
)
from sinkquant.cache.prefix import fingerprint
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk, open_model

IDS = [1, 9, 10]


def _damaged(family: str) -> PreTrainedModel:
    """The model with other projections: what quantization does, only worse. Embeddings stay."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_proj" in name or "v_proj" in name or "query_key_value" in name:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, 128, (3, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3] = torch.tensor(IDS)
    ids[1, :40], mask[1, :40] = 0, 0
    ids[1, 40:43] = torch.tensor(IDS)
    ids[2, :2] = torch.tensor([1, 9])  # begins alike, goes on differently
    return ids, mask


@pytest.mark.parametrize("chunk", [90, 2, 32])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_rows_that_begin_with_it_hold_it_exactly(family: str, chunk: int, tmp_path: Path) -> None:
    original, model = tiny_model(family), _damaged(family)
    save_prefix(make_prefix(original, IDS), tmp_path / "prefix.safetensors")
    prefix = load_prefix(tmp_path / "prefix.safetensors")
    prepare(model, prefix)
    ids, mask = _rows()
    cache = SinkCache(model.config, kv_plan(model, 2, window=16, max_exact=0, prefix=IDS))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in range(0, 90, chunk):
            stop = min(start + chunk, 90)
            model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                  past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        if not hasattr(layer, "exact_columns"):
            continue
        keys, values = layer.dense()
        for row, first in ((0, 0), (1, 40)):
            assert torch.equal(keys[row, :, first:first + 3], prefix.keys[index])
            assert torch.equal(values[row, :, first:first + 3], prefix.values[index])
        assert layer.packed_length > 43
        assert layer.exact_columns.tolist() == [[0, 1, 2], [40, 41, 42], [0, 1, -1]]


def test_a_model_in_training_gives_the_same_prefix() -> None:
    """Dropout makes noise of keys, and with gradient checkpointing no layer is given a cache."""
    model = tiny_model("llama", attention_dropout=0.5)
    expected = make_prefix(model, IDS)
    model.gradient_checkpointing = True
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    found = make_prefix(model.train(), IDS)
    assert model.training
    assert found.keys.keys() == expected.keys.keys()
    assert all(torch.equal(found.keys[layer], expected.keys[layer]) for layer in expected.keys)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "gpt2", "gpt_oss", "jetmoe"])
def test_a_model_on_disk_gives_the_same_one_block_by_block(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    walk = Walk(Decoder.of(open_model(tmp_path)), torch.tensor([IDS]), 1)
    found, whole = find_prefix(walk), make_prefix(model, IDS)
    assert all(parameter.is_meta for block in walk.decoder.blocks for parameter in block.parameters())
    assert (found.ids, found.model) == (whole.ids, whole.model)
    for ours, theirs in ((found.keys, whole.keys), (found.values, whole.values)):
        assert ours.keys() == theirs.keys()
        for layer, states in ours.items():
            torch.testing.assert_close(states, theirs[layer])


def test_a_row_that_was_cut_inside_the_prefix_goes_on_with_it(tmp_path: Path) -> None:
    model = prepare(_damaged("llama"), make_prefix(tiny_model("llama"), IDS))
    ids, mask = _rows()
    with torch.no_grad():
        for cut in ("crop", "saved"):
            cache = SinkCache(model.config, kv_plan(model, 2, window=16, max_exact=0, prefix=IDS))
            model(ids[:, :42], attention_mask=mask[:, :42], past_key_values=cache)
            if cut == "crop":
                cache.crop(-40)
            else:
                cache = SinkCache(model.config, cache.plan)
                model(ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache)
                save_cache(cache, tmp_path / "cut")
                cache = load_cache(model.config, tmp_path / "cut")
            cache.reorder_cache(torch.tensor([2, 1, 0]))
            order = ids[[2, 1, 0]]
            model(order[:, 2:], attention_mask=mask[[2, 1, 0]], past_key_values=cache)
            assert cache.layers[0].exact_columns.tolist() == [[0, 1, -1], [40, 41, 42], [0, 1, 2]]


def test_it_keeps_what_quantization_would_have_lost() -> None:
    """With nothing else quantized, a row's later tokens read the unquantized prefix."""
    original = tiny_model("llama")
    plain, mended = _damaged("llama"), prepare(_damaged("llama"), make_prefix(original, IDS))
    ids = _rows()[0][:1]
    outputs = []
    for model, prefix in ((plain, []), (mended, IDS)):
        cache = SinkCache(model.config, kv_plan(model, 16, prefix=prefix))
        with torch.no_grad():
            outputs.append(model(ids, past_key_values=cache).logits)
    reference = DynamicCache(config=original.config)
    with torch.no_grad():
        original(ids[:, :3], past_key_values=reference)
        expected = plain(ids[:, 3:], past_key_values=reference).logits
    assert torch.allclose(outputs[1][:, 3:], expected, atol=1e-5)
    assert not torch.allclose(outputs[0][:, 3:], expected, atol=1e-3)


def test_generate_with_padding_and_beams() -> None:
    original, model = tiny_model("llama"), tiny_model("llama")
    prepare(model, make_prefix(original, IDS))
    ids, mask = _rows()
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    expected = tiny_model("llama").generate(ids, attention_mask=mask, **settings)
    cache = SinkCache(model.config, kv_plan(model, 16, prefix=IDS))
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **settings), expected)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="another model"):
        prepare(model, make_prefix(tiny_model("llama", seed=1), IDS))
    with pytest.raises(RequestError, match="token ids"):
        make_prefix(model, [500])
    with pytest.raises(RequestError, match="was not given"):
        prepare(model)(torch.ones(1, 4, dtype=torch.long), past_key_values=SinkCache(
            model.config, kv_plan(model, 2, prefix=IDS)))
    with pytest.raises(RequestError, match="no KV prefix"):
        load_prefix(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(RequestError, match="not a safetensors file"):
        load_prefix(tmp_path / "text")


def test_tokens_in_front_come_after_the_padding() -> None:
    ids, mask = torch.tensor([[0, 0, 1, 20], [1, 20, 21, 22]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    rows, seen = put_in_front(ids, mask, [9, 10])
    assert rows.tolist() == [[0, 0, 9, 10, 1, 20], [9, 10, 1, 20, 21, 22]]
    assert seen.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    rows, seen = put_in_front(ids, None, [])
    assert torch.equal(rows, ids)
    assert seen.tolist() == [[1] * 4] * 2


def test_scores_come_behind_the_tokens_in_front() -> None:
    original, model = tiny_model("llama"), tiny_model("llama")
    prepare(model, make_prefix(original, [9, 10, 1]))
    ids = _rows()[0]
    ids[:, 0] = 1
    plan = kv_plan(model, 16, prefix=[9, 10, 1], front=[9, 10])
    with torch.no_grad():
        expected = original(put_in_front(ids, None, [9, 10])[0]).logits[:, 2:]
        without = original(ids).logits
    assert torch.allclose(cached_logits(model, ids, plan), expected, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_generate_wants_the_tokens_in_front() -> None:
    original = tiny_model("llama")
    model = tiny_model("llama")
    plan = kv_plan(model, 16, prefix=[9, 1], front=[9])
    install(model, plan, make_prefix(original, [9, 1]))
    ids, mask = _rows()
    ids[0, 0] = ids[2, 0] = 1
    for given in (ids, ids[:, :0]):
        with pytest.raises(RequestError, match="put_in_front"):
            model.generate(given, max_new_tokens=2)
    rows, seen = put_in_front(ids, mask, plan.front)
    with pytest.raises(RequestError, match="put_in_front"):
        model.generate(input_ids=rows, max_new_tokens=2)  # without its mask the padded row seems to begin with padding
    settings = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(rows, **settings), original.generate(rows, **settings))


@pytest.mark.parametrize(("family", "rope"), [
    ("llama", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}),
    ("phi3", {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}),
    ("gemma3_text", {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                     "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})])
def test_a_model_is_known_again_after_its_configuration_was_written(family: str, rope: dict[str, object],
                                                                    tmp_path: Path) -> None:
    """config.json is written with sorted keys, and what the hub has is in another order."""
    model = tiny_model(family)
    model.config.rope_parameters = dict(sorted(rope.items(), reverse=True))
    before = fingerprint(model, IDS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.config.rope_parameters) != list(model.config.rope_parameters)
    assert fingerprint(again, IDS) == before
    again.config.rope_parameters = {**rope, "rope_theta": 7.0}
    assert fingerprint(again, IDS) != before


def test_a_model_whose_layers_differ_in_heads_is_known_by_its_first() -> None:
    """Step 3.7's sliding layers have query heads of their own, and transformers then has no number for the whole."""
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_sliding_attention_heads": 8,
            "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 48,
            "mlp_layer_types": ["dense"] * 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("step3p7", text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert make_prefix(model, [1]).model == fingerprint(model, [1])


def test_a_model_is_known_again_in_float16() -> None:
    """Numbers of bfloat16 that float16 has no room for change on the way, and say nothing."""
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=1024)
    model.get_input_embeddings().weight.data[:4, ::7] *= 1e-4
    before = fingerprint(model, IDS)
    assert fingerprint(model.to(torch.float16), IDS) == before
    model.get_input_embeddings().weight.data[1, 0] += 0.1
    assert fingerprint(model, IDS) != before
