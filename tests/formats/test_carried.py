"""The checkpoint is the model, whole: what a user of the source folder relies on is in it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub.constants
import pytest
from backend_cases import BACKEND_CASES
from families import tiny_model
from sinkmaps import sink_map_of
from small_runs import fingerprint, model_folder
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to, save
from sinkquant.formats.carried import carry
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, source_of
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import bits_on_disk

GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": False, "temperature": 0.6, "top_p": 0.9,
              "something_new": {"a": 1}}
FILES = {
    "generation_config.json": json.dumps(GENERATION), "preprocessor_config.json": '{"size": 32}',
    "processor_config.json": '{"image_seq_length": 4}', "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages[0]['content'] }}", "additional_chat_templates/tools.jinja": "tools",
    "tokenizer.model": "sentencepiece", "vocab.json": "{}", "merges.txt": "a b", "added_tokens.json": "{}",
    "LICENSE": "free", "modeling_mine.py": "pass", "code/parts.py": "pass"}
LEFT = {"pytorch_model.bin": "", "model.gguf": "", ".gitattributes": "", "README.md": "of the unquantized model",
        "checkpoint-5/config.json": "{}", "onnx/model.onnx": "", "runs/events.0": "", "optimizer.pt": ""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path / "source")
    (folder / "generation_config.json").unlink()
    for name, content in (FILES | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    edit_config(folder, unknown={"nested": [1, {"a": None}]}, rope_theta=5e5, rope_parameters=None, max_length=40)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def quantized_to(source: Path, out: Path, model: PreTrainedModel | None = None,
                 settings: Sequence[str] = ("weights.method=rtn", "weights.group_size=32")) -> Path:
    """A checkpoint of a folder: from disk to disk, or through memory where the model is there."""
    made = model or open_model(source)
    decoder = Decoder.of(made)
    plan = make_plan(decoder.shape(""), sink_map_of(decoder), Recipe().replace(settings))
    if source_of(made) is not None:
        quantize_to(out, made, plan, load_tokenizer(source))
    else:
        save(quantize(made, plan), load_tokenizer(source), out)
    return out


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_file_of_the_source_is_in_the_checkpoint(source: Path, tmp_path: Path, in_memory: bool) -> None:
    out = quantized_to(source, tmp_path / "out", load_model(source) if in_memory else None)
    before, after = fingerprint(source), fingerprint(out)
    kept = {*FILES, "tokenizer.json", "tokenizer_config.json"}
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    assert set(after) == {*kept, "config.json", "model.safetensors", "sinkquant.json"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 7]


def test_unknown_keys_of_the_configuration_are_kept(source: Path, tmp_path: Path) -> None:
    out = quantized_to(source, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (source, out))
    assert after["unknown"] == {"nested": [1, {"a": None}]}
    assert set(before) - set(after) <= {"torch_dtype"}
    assert after["architectures"] == ["LlamaForCausalLM"]
    assert AutoConfig.from_pretrained(out).rope_parameters == AutoConfig.from_pretrained(source).rope_parameters


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_name_that_the_source_gives_its_weights_is_not(source: Path, tmp_path: Path, in_memory: bool) -> None:
    (source / "model.safetensors").rename(source / "mine.safetensors")
    edit_config(source, transformers_weights="mine.safetensors")
    out = quantized_to(source, tmp_path / "out", load_model(source) if in_memory else None)
    assert "transformers_weights" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
    load(out)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_head_of_its_own_is_said_to_be_one_and_null_is_no_quantization(
        source: Path, tmp_path: Path, in_memory: bool) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "quantization_config": None}))
    model = load_model(source) if in_memory else None
    out = quantized_to(source, tmp_path / "out", model, ["weights.ignore=['*']", "kv_cache.key_bits=4"])
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert written["tie_word_embeddings"] is False
    assert "quantization_config" not in written


def test_an_output_inside_the_source_is_not_taken_along(source: Path) -> None:
    inside = source / "runs" / "one"
    inside.mkdir()
    (inside / "plan.json").write_text("{}")
    assert not (quantized_to(source, inside / "model") / "runs").exists()


def test_what_was_changed_in_memory_is_written_as_it_is_now(source: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(source), load_tokenizer(source)
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape(""), sink_map_of(decoder), Recipe().replace(
        ["weights.method=rtn", "weights.group_size=32"]))
    model.generation_config.top_k = 7
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"eos_token": "w9"})
    out = save(quantize(model, plan), tokenizer, tmp_path / "out")
    again, words = load(out)
    assert (again.generation_config.top_k, again.generation_config.eos_token_id) == (7, [2, 7])
    assert (words.eos_token, words.chat_template) == ("w9", None)
    assert not (out / "merges.txt").exists()
    assert (out / "preprocessor_config.json").read_text() == FILES["preprocessor_config.json"]


def test_a_hub_ids_tokenizer_is_that_of_its_snapshot(source: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    model, tokenizer = load_model(snapshot), load_tokenizer(snapshot)
    model.name_or_path = tokenizer.name_or_path = "owner/tiny"  # as from_pretrained("owner/tiny") leaves them
    model.config._commit_hash = snapshot.name
    kept = {*FILES, "tokenizer.json", "tokenizer_config.json"}
    for name in ("same", "changed"):
        (tmp_path / name).mkdir()
        carry(tmp_path / name, model, tokenizer)
        tokenizer.chat_template = None
    before, same, changed = (fingerprint(folder) for folder in (snapshot, tmp_path / "same", tmp_path / "changed"))
    assert {name: same.get(name) for name in kept} == {name: before[name] for name in kept}
    assert "chat_template.jinja" not in changed


def test_a_model_that_was_made_in_memory_has_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "config.json").write_text("{}")
    (tmp_path / "here" / "private.txt").write_text("no part of the model")
    model = tiny_model("llama")
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape(""), sink_map_of(decoder), Recipe().replace(
        ["weights.method=rtn", "weights.group_size=32"]))
    out = save(quantize(model, plan), tiny_tokenizer(), tmp_path / "out")
    assert sorted(os.listdir(out)) == ["config.json", "generation_config.json", "model.safetensors", "sinkquant.json",
                                       "tokenizer.json", "tokenizer_config.json"]


def test_a_read_only_source_of_links_is_carried_as_plain_files(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [path for path in source.iterdir() if path.is_file()]:
        path.rename(blobs / f"blob-{path.name}")
        (blobs / f"blob-{path.name}").chmod(0o444)
        path.symlink_to(blobs / f"blob-{path.name}")
    source.chmod(0o555)
    out = quantized_to(source, tmp_path / "out")
    source.chmod(0o755)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o200 for path in files)


def test_broken_generation_settings_are_refused_before_any_block(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RequestError, match="generation_config"):
        quantized_to(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.parametrize("kind", ["rtn", "nf4"])
def test_code_that_the_model_brings_is_taken_along(source: Path, tmp_path: Path, kind: str) -> None:
    (source / "modeling_mine.py").write_text(MINE, encoding="utf-8")
    edit_config(source, model_type="mine", architectures=["MineForCausalLM"], auto_map={
        "AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
    settings = BACKEND_CASES.get(kind, ["weights.method=rtn", "weights.group_size=32"])
    out = quantized_to(source, tmp_path / "out", open_model(source, trust_remote_code=True), settings)
    assert 4 < bits_on_disk(out, trust_remote_code=True) < 16
    model, _ = load(out, trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)).__name__ == "MineForCausalLM"
    with pytest.raises(RequestError, match="custom code"):
        load(out)
