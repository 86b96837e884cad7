"""Checkpoints that are one GGUF file: bytes as planned, the same model read back by sinkquant and by transformers, the
same weights from the gguf package, and what is refused before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import tiny_model
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf.quants import dequantize
from interruptions import killed
from sinkmaps import sink_map_of
from tiny_bpe import BPE_VOCABULARY, byte_level
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sinkquant.artifacts import Plan
from sinkquant.compare.checkpoint import open_checkpoints
from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to, save
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_control, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import bits_on_disk, loader, weight_bytes
from sinkquant.schemes.gguf.metadata import ENDS_OF_TEXT, model_metadata
from sinkquant.schemes.gguf.names import FAMILIES, file_name, model_name

SIZES: dict[str, dict[str, Any]] = {"gemma3_text": {"layer_types": ["sliding_attention"] * 3}}
ROWS = torch.randint(3, BPE_VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
FEW = ("backend=gguf", "weights.group_size=32", "calibration.rows=4", "calibration.length=16", "seed=7")


def folder_of(place: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    model = tiny_model(family, dtype=dtype, vocab_size=BPE_VOCABULARY, **SIZES.get(family, {}), **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # the random ones are all the same
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


def plan_of(folder: Path, text: Path, *more: str, model: PreTrainedModel | None = None) -> Plan:
    decoder = Decoder.of(model or open_model(folder))
    recipe = Recipe().replace([*FEW, f"calibration.text={text}", *more])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, name="tiny"), recipe)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_every_family_comes_back_the_same_from_one_file(family: str, text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", family)
    model = load_model(source)
    plan = plan_of(source, text_file, "weights.method=rtn", "weights.overrides=[{pattern: '*.1.*', bits: 8}, "
                   "{pattern: '*.2.*', bits: 16}]", model=model)
    out = save(quantize(model, plan, load_tokenizer(source)), load_tokenizer(source), tmp_path / "out")
    file = out / "model.gguf"
    assert file.stat().st_size == plan.weight_bytes == weight_bytes(out)
    assert not list(out.glob("*.safetensors"))
    assert bits_on_disk(out) == pytest.approx(plan.bits_per_parameter)
    expected = logits(model)
    assert torch.allclose(logits(load(out)[0]), expected, atol=1e-6)  # Gemma's gains have a one added and taken off
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32).eval()
    if family in ("llama", "mistral", "qwen2"):  # transformers reads all of their configuration from the file
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copyfile(file, alone / "x.gguf")
        other = AutoModelForCausalLM.from_pretrained(alone, gguf_file="x.gguf", dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        assert type(other).__name__ == type(model).__name__.replace("Mistral", "Llama")  # as llama.cpp runs it
    else:
        read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=other)["tensors"]
        assert set(other.load_state_dict(read, strict=False).missing_keys) <= {"lm_head.weight"}  # tied
    assert torch.allclose(logits(other), expected, atol=1e-5)


@pytest.mark.parametrize(("grid", "kind"), [("int", "Q4_0"), ("iq4_nl", "IQ4_NL")])
def test_blocks_are_those_of_the_gguf_package(grid: str, kind: str, text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "qwen3", torch.bfloat16)  # whose rows keep their order
    model = load_model(source)
    plan = plan_of(source, text_file, "weights.group_size=64", f"weights.format={grid}", "weights.overrides=["
                   "{pattern: '*.1.*', bits: 8}, {pattern: '*.o_proj', bits: 5}]", model=model)
    out = save(quantize(model, plan, load_tokenizer(source)), load_tokenizer(source), tmp_path / "out")
    kinds = set()
    for one in GGUFReader(out / "model.gguf").tensors:
        name = model_name(FAMILIES["Qwen3ForCausalLM"], one.name)
        assert name is not None
        kinds.add(one.tensor_type.name)
        dense = torch.from_numpy(dequantize(one.data, one.tensor_type).copy())
        assert torch.equal(dense.to(torch.bfloat16), model.get_parameter(name)), name
        if name.removesuffix(".weight") in plan.formats:  # groups of 64: every scale stands twice
            scales = one.data.reshape(dense.shape[0], -1, GGML_QUANT_SIZES[one.tensor_type][1])[..., :2]
            pairs = scales.copy().view(numpy.float16).reshape(dense.shape[0], -1, 2)
            assert (pairs[..., 0] == pairs[..., 1]).all()
    assert kinds == {"F32", "BF16", kind, "Q5_0", "Q8_0"}
    assert (out / "model.gguf").stat().st_size == plan.weight_bytes
    assert torch.equal(load(out)[0].model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_compare_opens_it_by_its_folder_and_by_its_file(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    model = load_model(source)
    plan = plan_of(source, text_file, "weights.method=rtn", model=model)
    out = save(quantize(model, plan, load_tokenizer(source)), load_tokenizer(source), tmp_path / "out")
    for named in (out, out / "model.gguf"):
        (opened,) = open_checkpoints([str(named)])
        assert opened.form == "GGUF Q4_0"
        assert 0 < opened.bytes < (out / "model.gguf").stat().st_size  # the header is none of its tensors
        assert opened.folder == out


@pytest.mark.parametrize("ends", ["q8_0", "f16"])
def test_from_disk_to_disk_with_other_ends(ends: str, text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama", torch.bfloat16, tie_word_embeddings=True)
    plan = plan_of(source, text_file, f"weights.ends={ends}")
    out = tmp_path / "out"
    with killed(0, "_check_reload"):
        quantize_to(out, open_model(source), plan, load_tokenizer(source))
    quantize_to(out, open_model(source), plan, load_tokenizer(source))
    assert not list(out.glob("*.safetensors"))
    assert (out / "model.gguf").stat().st_size == plan.weight_bytes
    kinds = {one.name: one.tensor_type.name for one in GGUFReader(out / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == ends.upper()
    assert "output.weight" not in kinds
    again, before = load(out / "model.gguf")[0], load_model(source)
    difference = (again.get_input_embeddings().weight - before.get_input_embeddings().weight).abs().max()
    assert difference < (2e-3 if ends == "q8_0" else 1e-7)
    in_memory = quantize(before, plan, load_tokenizer(source))
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, in_memory.model.layers[0].mlp.down_proj.weight)
    assert save(in_memory, load_tokenizer(source), tmp_path / "saved").joinpath("model.gguf").read_bytes() == (
        out / "model.gguf").read_bytes()


@pytest.mark.parametrize(("method", "wanted", "kinds"), [
    ("rtn", "symmetric=false", {"Q4_1", "Q5_1"}), ("gptq", "symmetric=false", {"Q4_1", "Q5_1"}),
    ("gptq", "format=iq4_nl", {"IQ4_NL", "Q5_0"})])
def test_what_the_gguf_package_and_transformers_make_of_other_kinds(
        method: str, wanted: str, kinds: set[str], text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama", torch.bfloat16)
    plan = plan_of(source, text_file, f"weights.{wanted}", f"weights.method={method}", "weights.group_size=32",
                   "weights.overrides=[{pattern: '*.o_proj', bits: 8}, {pattern: '*.gate_proj', bits: 5}, "
                   "{pattern: '*.up_proj', bits: 5}]")
    quantize_to(out := tmp_path / "out", open_model(source), plan, load_tokenizer(source))
    assert (out / "model.gguf").stat().st_size == plan.weight_bytes
    read = GGUFReader(out / "model.gguf").tensors
    assert {one.tensor_type.name for one in read} == {"F32", "BF16", "Q8_0"} | kinds
    down = next(one for one in read if one.name == "blk.0.ffn_down.weight")
    theirs = torch.from_numpy(dequantize(down.data, down.tensor_type).copy()).to(torch.bfloat16)
    assert torch.equal(load(out)[0].model.layers[0].mlp.down_proj.weight, theirs)
    again = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.bfloat16)
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, theirs)


def test_the_control_is_one_file_of_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    decoder = Decoder.of(open_model(folder_of(tmp_path / "model", "llama", num_hidden_layers=6)))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.3.mlp.down_proj": 0.9}, name="tiny")
    recipe = Recipe().replace([*FEW, "protect.channels=module", "protect.bits=8"])
    plan = make_plan(shape, sink_map, recipe)
    assert plan.modules["model.layers.3.mlp.down_proj"].bits == 8
    control = make_control(shape, sink_map, recipe, plan)
    assert control.weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)
    assert plan.loads_in[0] == "llama.cpp"


def test_the_names_are_those_of_the_gguf_package() -> None:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    for family in FAMILIES.values():
        theirs = get_tensor_name_map(known[family.architecture], 2)
        assert isinstance(known[family.architecture], MODEL_ARCH)
        inside = [f"model.layers.1.{one}" for one in family.blocks]
        for name in ("model.embed_tokens", "model.norm", "lm_head", *inside):
            mine = file_name(family, f"{name}.weight")
            assert mine == theirs.get_name(f"{name}.weight", (".weight",)), name
            assert mine is None or model_name(family, mine) == f"{name}.weight"


@pytest.mark.parametrize(("family", "settings", "more", "message"), [
    ("gpt_neox", {}, (), "cannot be written of GPTNeoXForCausalLM, only of Llama, Mistral"),
    ("mixtral", {}, (), "cannot be written of MixtralForCausalLM"),
    ("llama", {"intermediate_size": 80}, ("weights.group_size=-1",), "does not divide the 80 input columns of"),
    ("llama", {}, ("weights.group_size=16",), "a scale of a GGUF file is of 32 columns"),
    ("llama", {}, ("weights.bits=3",), "weights.bits is 3, and gguf holds 4 or 5 or 8 bits"),
    ("llama", {}, ("weights.format=iq4_nl", "weights.symmetric=false"), "symmetric=false is not held by the backend"),
    ("llama", {}, ("weights.format=iq4_nl", "weights.distill=2"), "on the grid of IQ4_NL are not tuned"),
    ("llama", {}, ("weights.format=iq4_nl", "prune.method=wanda"), "IQ4_NL of 4 bits have no code for zero"),
    ("llama", {}, ("activations.format=int8",), "gguf checkpoints cannot ask for inputs in int8"),
    ("llama", {}, ("protect.channels=split",), "split"),
    ("llama", {}, ("backend=gptq", "weights.ends=q8_0"), "'q8_0' is not held by the backend gptq; use 16-bit"),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3}, (), "other layers with a window than llama.cpp"),
    ("gemma2", {"query_pre_attn_scalar": 64}, (), "scales attention by 64, where llama.cpp takes 16"),
    ("llama", {"hidden_act": "relu"}, (), "the activation 'relu', which llama.cpp does not compute in a Llama"),
    ("gemma2", {"attn_logit_softcapping": None}, (), "no attn_logit_softcapping, and llama.cpp caps in every Gemma 2"),
    ("qwen3", {"attention_bias": True}, (), "biases in its attention, which llama.cpp does not read in a Qwen3"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, (), "a sliding window"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16.0,
                                   "original_max_position_embeddings": 128}}, (), "by yarn with a beta_fast of 16"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}, (),
     "by 'llama3', which llama.cpp reads in a Llama alone"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, (),
     "scales its rotary embedding by 'dynamic'")])
def test_refused_before_anything_is_computed(family: str, settings: dict[str, Any], more: tuple[str, ...], message: str,
                                             text_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    tiny_model(family, vocab_size=BPE_VOCABULARY, **(SIZES.get(family, {}) | settings)).save_pretrained(place)
    byte_level().save_pretrained(place)
    with pytest.raises(RequestError, match=message):
        plan_of(place, text_file, *more)


@pytest.mark.parametrize(("family", "settings"), [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}), ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 32.0,
                                   "attention_factor": 1.138629436, "original_max_position_embeddings": 128}}),
    ("gemma2", {"hidden_act": "gelu"})])
def test_what_llama_cpp_runs_alike_is_written(family: str, settings: dict[str, Any], text_file: Path,
                                              tmp_path: Path) -> None:
    place = tmp_path / "model"
    tiny_model(family, vocab_size=BPE_VOCABULARY, **SIZES.get(family, {})).save_pretrained(place)
    byte_level().save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "layer_types"}
                                                  | settings))
    assert plan_of(place, text_file).loads_in[0] == "llama.cpp"


def test_what_the_tokenizer_does_not_name_is_config_json_s(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None, "eos_token": None}))
    for given, ids in (({}, (1, 2)), ({"eos_token_id": None}, (1, None)), ({"eos_token_id": [2, 1]}, (1, None)),
                       ({"eos_token_id": BPE_VOCABULARY}, (1, None)), ({"eos_token_id": 7, "bos_token_id": 5}, (1, 7)),
                       (None, (1, 2))):  # rows begin with the first
        config = json.loads((source / "config.json").read_text())
        if given is None:
            del config["eos_token_id"]
        (source / "config.json").write_text(json.dumps(config | (given or {})))
        found = model_metadata(source, "LlamaForCausalLM")
        assert tuple(found.get(f"tokenizer.ggml.{kind}_token_id", ("", None))[1] for kind in ("bos", "eos")) == ids
    plan = plan_of(source, text_file, "weights.method=rtn")
    quantize_to(tmp_path / "out", open_model(source), plan, load_tokenizer(source))
    assert (tmp_path / "out" / "model.gguf").stat().st_size == plan.weight_bytes


def test_usual_ends_of_text_are_transformers_own() -> None:
    made = {FAMILIES[f"{name}ForCausalLM"].architecture: AutoConfig.for_model(kind) for name, kind in (
        ("Llama", "llama"), ("Mistral", "mistral"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("Gemma2", "gemma2"),
        ("Gemma3", "gemma3_text"), ("Phi3", "phi3"))}
    assert {name: (one.bos_token_id, one.eos_token_id) for name, one in made.items()
            if one.bos_token_id is not None} == ENDS_OF_TEXT


def test_a_template_that_was_changed_is_counted_anew(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    before = plan_of(source, text_file).weight_bytes
    with (source / "chat_template.jinja").open("a") as file:
        file.write("x" * 4096)
    assert plan_of(source, text_file).weight_bytes == before + 4096


def test_yarn_and_a_window_as_transformers_has_them(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": None, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    source = folder_of(tmp_path / "model", "phi3", sliding_window=32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    found = model_metadata(source, "Phi3ForCausalLM")
    assert (found["phi3.rope.scaling.factor"], found["phi3.attention.sliding_window"]) == (("f32", 4.0), ("u32", 32))


def test_refused_without_the_folder_that_a_file_takes_its_tokenizer_from(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="was made in memory; save it and load it from there"):
        plan_of(tmp_path, text_file, model=tiny_model("llama"))
    place = folder_of(tmp_path / "model", "llama")
    (place / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
        plan_of(place, text_file)


def test_a_file_that_is_cut_is_refused(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    quantize_to(tmp_path / "out", open_model(source), plan_of(source, text_file, "weights.method=rtn"),
                load_tokenizer(source))
    file = tmp_path / "out" / "model.gguf"
    whole = file.read_bytes()
    for keep in (0, 3, 20, 500, 9000, len(whole) - 40):
        file.write_bytes(whole[:keep])
        with pytest.raises(RequestError, match="is cut"):
            resolve(str(tmp_path / "out"))


def test_llama_3_s_frequencies_stand_in_the_file(text_file: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    source = folder_of(tmp_path / "model", "llama", rope_parameters=rope)
    plan = plan_of(source, text_file, "weights.method=rtn")
    quantize_to(tmp_path / "out", open_model(source), plan, load_tokenizer(source))
    assert (tmp_path / "out" / "model.gguf").stat().st_size == plan.weight_bytes
    (factors,) = [one.data for one in GGUFReader(tmp_path / "out" / "model.gguf").tensors
                  if one.name == "rope_freqs.weight"]
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    rotary = load_model(source).model.rotary_emb
    assert torch.allclose(plain / torch.from_numpy(factors.copy()), rotary.inv_freq, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["file"] == "model.gguf"


def test_a_cache_knows_its_model_whose_embedding_was_rounded_to_8_bits(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama", torch.bfloat16)
    plan = plan_of(source, text_file, "weights.method=rtn", "weights.ends=q8_0",
                   "kv_cache={window: 0, group_size: 32, prefix: bos}")
    out = save(quantize(load_model(source), plan, load_tokenizer(source)), load_tokenizer(source), tmp_path / "out")
    assert load(out)[0].generate(ROWS, max_new_tokens=2, do_sample=False).shape == (2, 26)
    loader(out, torch.float32, "cpu")()


def test_blocks_beyond_the_last_one_stay_out_of_the_file(text_file: Path, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", "llama")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(config))
    plan = plan_of(source, text_file, "weights.method=rtn")
    quantize_to(tmp_path / "out", open_model(source), plan, load_tokenizer(source))
    assert (tmp_path / "out" / "model.gguf").stat().st_size == plan.weight_bytes
    assert not [one.name for one in GGUFReader(tmp_path / "out" / "model.gguf").tensors if "blk.2" in one.name]


def test_a_phi_without_the_token_that_llama_cpp_looks_for_has_another_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "phi3")
    assert model_metadata(folder, "Phi3ForCausalLM")["general.name"] == ("str", "Phi")
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    assert model_metadata(folder, "Phi3ForCausalLM")["general.name"] == ("str", "Phi-3")
