"""sq.load(folder, packed=True): the logits of the dense weights to the noise of bfloat16, and nothing dense unsaid."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import distance, quantized
from families import FAMILIES, tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.errors import RequestError
from sinkquant.formats import load, save
from sinkquant.inference import KernelLinear
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
CASES = [(family, WIDTHS[place % 7], (32, -1, 64)[place % 3]) for place, family in enumerate(FAMILIES)]
ROWS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 bits in groups of 32; one linear is in 16 bits, another has groups that no kernel takes."""
    model, *_ = quantized(text_file, dtype=torch.bfloat16, more=(
        "weights.ignore=['*layers.0.self_attn.o_proj']",
        "weights.overrides=[{pattern: '*layers.1.mlp.down_proj', bits: 3, group_size: 16}]"))
    return save(model, tiny_tokenizer(), tmp_path_factory.mktemp("packed") / "out")


@pytest.mark.parametrize(("family", "bits", "group"), CASES)
def test_every_family_gives_the_logits_of_its_dense_weights(text_file: Path, tmp_path: Path, family: str, bits: int,
                                                            group: int) -> None:
    model, plan, _ = quantized(text_file, family, bits=bits, group=group, dtype=torch.bfloat16)
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    packed, tokenizer = load(out, packed=True)
    assert distance(packed, model, ROWS) < 0.03
    found = sq.packing(packed)
    assert set(found.kernels) == set(plan.formats)
    assert all("fused experts" in why or "16 bits" in why for why in found.dense.values())
    fused = any("fused experts" in why for why in found.dense.values())
    assert fused == (family == "gpt_oss")
    made = packed.generate(**tokenizer("w9 w10", return_tensors="pt"), max_new_tokens=4)
    assert made.shape[1] > 3


def test_what_is_dense_is_named_and_what_it_takes_is_counted(folder: Path) -> None:
    packed = load(folder, packed=True)[0]
    found = sq.packing(packed)
    assert found.dense["model.layers.0.self_attn.o_proj"] == "left in 16 bits by the checkpoint"
    assert "group size 16" in found.dense["model.layers.1.mlp.down_proj"]
    assert "lm_head" in found.dense
    assert len(found.kernels) == 19
    assert distance(packed, load(folder)[0], ROWS) < 0.02
    assert distance(packed, load(folder)[0], ROWS.repeat(8, 1)) < 0.02  # enough tokens to make weights dense
    linears = [module for module in packed.modules() if isinstance(module, KernelLinear)]
    weights = sum(module.in_features * module.out_features for module in linears)
    assert found.linear_bfloat16_bytes == 2 * weights
    assert found.linear_bytes == weights * 5 // 8  # 4 bits, and 32 for every 32 weights
    assert found.expanded_bytes == weights // 16 - 16 * len(linears)  # a zero beside every scale; no shape
    dense = load(folder)[0]  # in bfloat16, but for rotary frequencies
    assert found.bfloat16_bytes == sum(t.nbytes for t in (*dense.parameters(), *dense.buffers()))
    with pytest.raises(RequestError, match="not packed"):
        sq.packing(dense)


def test_neither_the_words_of_the_checkpoint_nor_its_mapped_file_stay(folder: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        model = load(folder, packed=True)[0]
        linears = [one for one in gc.get_objects() if type(one) is torch.nn.Linear]
        assert not [one for one in linears if "weight_packed" in one._parameters]
    finally:
        gc.enable()
    if (maps := Path("/proc/self/maps")).exists():
        assert not [line for line in maps.read_text().splitlines() if str(folder) in line]
        assert next(model.parameters()).device.type == "cpu"  # the model is still there


def test_columns_and_super_weights_beside_the_codes_are_added(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    decoder = Decoder.of(model)
    names = list(decoder.shape("").linears)
    recipe = Recipe().replace(["weights.method=rtn", "weights.group_size=32", "protect.channels=split",
                               "protect.max_share=0.5"])
    plan = make_plan(decoder.shape("llama"), sink_map_of(decoder, {names[0]: 0.6, names[-1]: 0.3}), recipe)
    assert any(form.columns for form in plan.formats.values())
    out = save(quantize(model, plan, tiny_tokenizer()), tiny_tokenizer(), tmp_path / "out")
    packed = load(out, packed=True)[0]
    assert set(sq.packing(packed).kernels) == set(plan.formats)
    assert distance(packed, model, ROWS) < 0.02
    module = packed.get_submodule(names[0])
    assert isinstance(module, KernelLinear)
    assert module.outliers is not None


@pytest.mark.parametrize("more", [
    ("weights.bits=8", "weights.group_size=-1", "activations.format=int8", "activations.scale=tensor"),
    ("activations.format=int4",)])
def test_inputs_are_rounded_as_the_checkpoint_asks(text_file: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    model = quantized(text_file, dtype=torch.bfloat16, more=more)[0]
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    packed, dense = load(out, packed=True)[0], load(out)[0]
    assert sq.packing(packed).kernels
    hooks = [len(module._forward_pre_hooks) for module in packed.modules() if isinstance(module, KernelLinear)]
    assert set(hooks) == {1}
    assert distance(packed, dense, ROWS) < 0.1  # a last bit decides about a code of the inputs now and then


def test_a_packed_cache_is_installed_too(text_file: Path, tmp_path: Path) -> None:
    model = quantized(text_file, dtype=torch.bfloat16, more=(
        "kv_cache.key_bits=4", "kv_cache.value_bits=4", "kv_cache.exact=first-n", "kv_cache.window=8"))[0]
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    packed, dense = load(out, packed=True)[0], load(out)[0]
    found = [one.generate(ROWS, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
             for one in (packed, dense)]
    assert type(found[0].past_key_values) is type(found[1].past_key_values)
    assert "sinkquant" in type(found[0].past_key_values).__module__


def test_what_cannot_be_packed_is_refused(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="computes in bfloat16"):
        load(folder, torch.float32, packed=True)
    with pytest.raises(RequestError, match="holds no packed weights"):
        load(tiny_folder, packed=True)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="in another library's"):
        load(other, packed=True)


def test_a_packed_model_is_not_quantized_observed_or_saved(folder: Path, text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, packed=True)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(model, quantized(text_file)[1])
    with pytest.raises(RequestError, match="keeps its weights packed"):
        sq.detect(model, tokenizer)
    with pytest.raises(RequestError, match="copy the folder"):
        model.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*.safetensors"))


@pytest.mark.parametrize(("bits", "far", "saved_of_a_token"), [(8, 0.05, 64 - 2), (4, 0.6, 64 + 32 - 2 * 4)])
@pytest.mark.parametrize(("family", "overrides"), [
    ("llama", {"tie_word_embeddings": True}), ("gemma3_text", {}), ("phi3", {})])
def test_embedding_and_head_take_fewer_bits_where_asked(text_file: Path, tmp_path: Path, family: str, bits: int,
                                                        overrides: dict[str, bool], far: float,
                                                        saved_of_a_token: int) -> None:
    model = quantized(text_file, family, dtype=torch.bfloat16, **overrides)[0]
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    packed, plain = load(out, packed=True, head_bits=bits)[0], load(out, packed=True)[0]
    assert distance(packed, plain, ROWS) < far
    found, before = sq.packing(packed), sq.packing(plain)
    assert "lm_head" not in found.dense
    assert found.kernels["lm_head"] == f"int{bits}"
    assert (found.bfloat16_bytes, found.linear_bytes) == (before.bfloat16_bytes, before.linear_bytes)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    saved = (1 if tied else 2) * 128 * saved_of_a_token  # of 128 bytes: codes, and scales with their zeros
    assert before.bytes - found.bytes in (saved, saved + 2)  # Gemma has a factor beside its embedding
    with pytest.raises(RequestError, match="packed=True"):
        load(out, head_bits=8)
    with pytest.raises(RequestError, match="4, 8 or 16"):
        load(out, packed=True, head_bits=6)
