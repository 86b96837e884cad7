"""Ranges without the prefix: what sinkquant gives, and what plain transformers gives with and without it. Static scales
from disk to disk, interrupted and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from interruptions import killed
from planter import Plant, plant
from sinkmaps import sink_map_of
from small_runs import fingerprint, model_folder
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

import sinkquant as sq
from sinkquant.cache import cached_logits, load_prefix, make_prefix, save_prefix
from sinkquant.errors import RequestError
from sinkquant.formats import KV_PREFIX, quantize_to
from sinkquant.formats.simulated import SCALES
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.policy import make_plan

SETTINGS = ["weights.bits=8", "weights.group_size=-1", "weights.method=rtn", "calibration.rows=4",
            "calibration.length=16", "activations.format=int8", "activations.scale=tensor"]
EXCLUDE = ["activations.sinks=exclude", "kv_cache={key_bits: 16, value_bits: 16, prefix: bos}"]


def test_a_plain_engine_gives_the_same_with_the_prefix_and_clips_the_sink_without(text_file: Path,
                                                                                 tmp_path: Path) -> None:
    original = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1}), 7, 1, peak=60.0))
    decoder = Decoder.of(original)
    recipe = sq.Recipe().replace([f"calibration.text={text_file}", *SETTINGS, *EXCLUDE])
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)
    assert plan.kv_cache is not None
    prefix = make_prefix(original, plan.kv_cache.prefix)
    model = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1}), 7, 1, peak=60.0))
    folder = sq.save(sq.quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / "out")
    save_prefix(prefix, folder / KV_PREFIX)

    rows = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1
    plain = AutoModelForCausalLM.from_pretrained(folder)
    stored = load_prefix(folder / KV_PREFIX)
    cache = DynamicCache(config=plain.config)
    for layer, keys in stored.keys.items():
        cache.update(keys[None].expand(2, -1, -1, -1), stored.values[layer][None].expand(2, -1, -1, -1), layer)
    with torch.no_grad():
        ours = cached_logits(sq.load(folder)[0], rows, plan.kv_cache)
        theirs = plain(rows[:, 1:], past_key_values=cache, attention_mask=torch.ones_like(rows)).logits
        without = plain(rows).logits
        wanted = original(rows).logits
    # The sums of attention are taken in another order, so that an input on the edge may fall to the other code.
    assert (ours[:, 1:] - theirs).norm() < 1e-3 * theirs.norm()
    assert (ours - wanted)[:, 1:].norm() < 0.2 * (without - wanted)[:, 1:].norm()
    assert (ours - wanted)[:, 0].norm() < 0.2 * wanted[:, 0].norm()  # the sink itself is not rounded either


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_stored_scales_are_the_same_from_memory_from_disk_and_after_a_crash(
        form: str, text_file: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "source", dtype=torch.bfloat16)
    recipe = sq.Recipe().replace([f"calibration.text={text_file}", *SETTINGS, f"activations.format={form}",
                                  "weights.method=gptq"])
    decoder = Decoder.of(open_model(source))
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.6}), recipe)
    model = load_model(source)
    sq.save(sq.quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / "memory", recipe=recipe)
    with killed(2):
        quantize_to(tmp_path / "disk", open_model(source), plan, tiny_tokenizer())
    seen: list[int] = []
    quantize_to(tmp_path / "disk", open_model(source), plan, tiny_tokenizer(), plan.sink_map, recipe,
                progress=lambda done, *_: seen.append(done))
    assert seen == [3]
    assert fingerprint(tmp_path / "memory") == fingerprint(tmp_path / "disk")
    assert (tmp_path / "disk" / SCALES).is_file() == (form == "int4")


def test_a_cache_that_was_not_given_the_prefix_is_refused(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    decoder = Decoder.of(model)
    recipe = sq.Recipe().replace([f"calibration.text={text_file}", *SETTINGS, *EXCLUDE])
    plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)
    folder = sq.save(sq.quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / "out")
    sq.load(folder)[0].generate(torch.tensor([[1, 9, 10]]), max_new_tokens=2)
    (folder / KV_PREFIX).unlink()
    with pytest.raises(RequestError, match="starts rows from a prefix"):
        sq.load(folder)[0].generate(torch.tensor([[1, 9, 10]]), max_new_tokens=2)
