"""FP8 scales of the KV cache in the checkpoint: where vLLM and compressed-tensors read them, and what they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import plain_logits, quantized, weight_bytes
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from sinkmaps import sink_map_of
from small_runs import fingerprint, model_folder, small_recipe
from tiny_tokenizer import tiny_tokenizer

from sinkquant import RequestError, load
from sinkquant.formats import quantize_to, save
from sinkquant.models import Decoder, load_tokenizer, open_model, read_text, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize.state import state_of
from sinkquant.recipe import Recipe

CASES = [("llama", "tensor", torch.bfloat16), ("phi3", "attn_head", torch.float32),
         ("qwen3_moe", "tensor", torch.float16)]


def test_plain_transformers_rounds_keys_and_values_to_the_same_logits(text_file: Path, tmp_path: Path) -> None:
    rows = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    expected, folders = [], []
    for index, (family, strategy, dtype) in enumerate(CASES):
        model, plan, _ = quantized(text_file, family, "rtn", 4, 32, dtype,
                                   (f"kv_cache_scheme={{strategy: {strategy}}}", "weights.lm_head=8"))
        with torch.no_grad():
            expected.append(model(rows, use_cache=False).logits)
        folders.append(save(model, tiny_tokenizer(), tmp_path / str(index)))
        assert plan.weight_bytes == weight_bytes(folders[-1])
        assert all(one.startswith(("transformers", "vllm")) for one in plan.loads_in)
    found = plain_logits(rows, folders, tmp_path)
    for index, one in enumerate(expected):
        assert torch.equal(found[index], one), CASES[index]
    scheme = json.loads((folders[0] / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor",
                      "group_size": None}
    with safe_open(folders[1] / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.2.self_attn.v_scale").get_shape() == [2, 1, 1]
    # Packed weights in memory keep rounding the cache.
    packed, _ = load(folders[0], packed=True)
    dense, _ = load(folders[0])
    assert (packed(rows).logits - dense(rows).logits).float().norm() < 0.03 * dense(rows).logits.float().norm()
    assert packed.model.layers[0].self_attn.k_scale.item() == dense.model.layers[0].self_attn.k_scale.item()


def test_the_scale_is_the_largest_key_of_the_tokens_that_count(text_file: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model")
    tokenizer, found = load_tokenizer(source), {}
    for sinks in ("all", "exclude"):
        recipe = small_recipe(text_file, f"kv_cache_scheme={{sinks: {sinks}}}", "weights.method=rtn")
        model = open_model(source)
        decoder = Decoder.of(model)
        plan = make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)
        quantize_to(tmp_path / sinks, model, plan, tokenizer)
        found[sinks] = load_file(tmp_path / sinks / "model.safetensors")
        assert plan.weight_bytes == weight_bytes(tmp_path / sinks)
    model, _ = load(source)
    rows = token_rows(tokenizer, read_text(str(text_file), "calibration"), 4, 64, "auto")
    with torch.no_grad():
        cache = model(rows, use_cache=True).past_key_values
    for layer in range(3):
        keys = cache.layers[layer].keys.abs()
        for sinks, part in (("all", keys), ("exclude", keys[:, :, 1:])):
            scale = found[sinks][f"model.layers.{layer}.self_attn.k_scale"]
            assert scale.shape == (1,)
            assert float(scale) == pytest.approx(float(part.max()) / 448, rel=1e-5)


def test_in_memory_and_after_a_kill_the_bytes_are_the_same(text_file: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    recipe, tokenizer = small_recipe(text_file, "kv_cache_scheme.strategy=tensor"), load_tokenizer(source)

    def write(name: str, stop: int | None) -> Path:
        model = open_model(source)
        decoder = Decoder.of(model)

        def progress(done: int, _: int, __: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        quantize_to(tmp_path / name, model, make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe), tokenizer,
                    progress=progress)
        return tmp_path / name

    with pytest.raises(KeyboardInterrupt):
        write("killed", 2)
    assert fingerprint(write("killed", None)) == fingerprint(write("whole", None))


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("llama", ["backend=gptq"], "belongs to the files of compressed-tensors, and gptq has no place"),
    ("llama", ["kv_cache={key_bits: 8}"], "set one of them to null"),
    ("llama", ["protect.channels=split"], "own format carries no kv_cache_scheme"),
    ("gpt_neox", [], "has layers that keep none, or under names that compressed-tensors does not know")])
def test_what_cannot_carry_it_is_refused_by_name(family: str, changes: list[str], message: str) -> None:
    decoder = Decoder.of(tiny_model(family))
    with pytest.raises(RequestError, match=message):
        make_plan(decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.9}),
                  Recipe().replace(["weights.group_size=32", "kv_cache_scheme={}", *changes]))


def test_a_quantized_model_in_memory_holds_its_scales(text_file: Path) -> None:
    model, plan, _ = quantized(text_file, more=("kv_cache_scheme={}",))
    scales = state_of(model).kv_scales
    assert len(scales) == 2 * 3
    assert plan.kv_scheme is not None
    assert model.model.layers[1].self_attn.v_scale.item() == scales["model.layers.1.self_attn.v_scale"].item()
