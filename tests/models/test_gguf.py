"""A GGUF file is a model too: what transformers reads of it, dequantized, with a note of what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from gguf_files import write_gguf
from tiny_tokenizer import random_text
from transformers import AutoModelForCausalLM, GgufConfig

from sinkquant import detect, load
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.models.gguf import SOURCE, gguf_at
from sinkquant.recipe import Recipe


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where unpacked files are kept in these tests."""
    monkeypatch.setattr("sinkquant.models.kept.cached_assets_path", lambda *_, **__: tmp_path / "assets")
    return tmp_path / "assets"


@pytest.mark.parametrize(("kind", "dtype"), [
    ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16),
    ("Q4_0", torch.bfloat16)])
def test_it_is_the_model_that_transformers_reads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", kind)
    model, tokenizer = load(tmp_path / "tiny.gguf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=dtype,
                                                    quantization_config=GgufConfig(dequantize=True))
    assert model.dtype == dtype
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.allclose(tensor.float(), written.state_dict()[name], atol=0.02)
    assert tokenizer("w1.")["input_ids"] == [1, 3, 8, 10, 4]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    notes = Decoder.of(open_model(resolve(str(tmp_path / "tiny.gguf")))).shape("").notes
    assert ("quantized before" in notes[0]) == kind.startswith("Q")
    assert "tiny.gguf" in notes[0]


def test_a_folder_with_one_is_read_and_unpacked_once(tmp_path: Path, assets: Path) -> None:
    model = write_gguf(tmp_path / "models" / "tiny.gguf") if (tmp_path / "models").mkdir() is None else None
    folder = resolve(str(tmp_path / "models"))
    assert folder.parent == assets
    stamp = (folder / "model.safetensors").stat().st_ino
    assert resolve(str(tmp_path / "models" / "tiny.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_ino == stamp
    assert [path.name for path in assets.iterdir()] == [folder.name]
    assert json.loads((folder / SOURCE).read_text())["types"] == {"F32": 30}
    write_gguf(tmp_path / "models" / "other.gguf", model=model)
    with pytest.raises(RequestError, match=r"holds 2 GGUF files; name one of them, such as .*other\.gguf"):
        resolve(str(tmp_path / "models"))


def test_a_folder_whose_name_ends_as_a_file_s_is_a_folder(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(tiny_folder)
    assert gguf_at(str(tmp_path / "model.gguf")) is None
    (tmp_path / "file.gguf").touch()
    assert gguf_at(str(tmp_path / "file.gguf")) == tmp_path / "file.gguf"


def test_safetensors_go_before_a_gguf_beside_them(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_folder)
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"


def test_detection_says_what_the_weights_were(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    (tmp_path / "text.txt").write_text(random_text(2000))
    folder = resolve(str(tmp_path / "tiny.gguf"))
    recipe = Recipe().replace(["detect.rows=4", "detect.long_rows=1", "detect.length=32", "detect.long_length=64",
                               "detect.super_weights=false"])
    found = detect(load_model(folder), load_tokenizer(folder), str(tmp_path / "text.txt"), recipe)
    assert any("tiny.gguf, where they were quantized before (Q8_0)" in note for note in found.notes)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, 5000, 100_000, -1])
def test_a_file_that_is_cut(tmp_path: Path, assets: Path, keep: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RequestError, match=r"is cut or broken|is no GGUF file") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert not assets.exists() or not list(assets.iterdir())


def test_what_transformers_cannot_read_is_said_by_name(tmp_path: Path, assets: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", architecture="rwkv7")
    with pytest.raises(RequestError, match=r"transformers cannot read .*odd\.gguf: .*rwkv7") as caught:
        resolve(str(tmp_path / "odd.gguf"))
    assert "\n" not in str(caught.value)
    assert not list(assets.iterdir())
    (tmp_path / "fake.gguf").write_text("no such thing")
    with pytest.raises(RequestError, match="is no GGUF file"):
        resolve(str(tmp_path / "fake.gguf"))
    with pytest.raises(RequestError, match="is not a model folder, a GGUF file"):
        resolve(str(tmp_path / "missing.gguf"))


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny-00001-of-00002.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RequestError, match="is one of 2 parts, which transformers does not read; merge them first"):
        resolve(str(path))
