"""Which files of a folder are read: those that transformers would load."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from families import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import Decoder, open_model, resolve
from sinkquant.models.folder import inside_run, weight_files
from sinkquant.models.headers import read_header

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    return tiny_model("llama", seed=5)


def what_is_read(folder: Path) -> torch.Tensor:
    """One weight as it is read here, which must be what transformers loads."""
    decoder = Decoder.of(open_model(resolve(str(folder))))
    with decoder.present([decoder.model]):
        found = decoder.model.get_parameter(NAME).data.clone()
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(folder).get_parameter(NAME))
    return found


def test_a_single_file_goes_before_an_index(folder: Path, tiny: PreTrainedModel, other: PreTrainedModel,
                                            tmp_path: Path) -> None:
    other.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folder)
    assert torch.equal(what_is_read(folder), tiny.get_parameter(NAME))
    (folder / "model.safetensors").unlink()
    assert torch.equal(what_is_read(folder), other.get_parameter(NAME))


def test_the_file_that_the_configuration_names_goes_first(folder: Path, other: PreTrainedModel, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert torch.equal(what_is_read(folder), other.get_parameter(NAME))
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other/model.safetensors"}))
    with pytest.raises(RequestError, match="no safetensors file of this folder"):
        resolve(str(folder))


def test_a_hub_snapshot_of_links_is_read(folder: Path, tiny: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert torch.equal(what_is_read(folder), tiny.get_parameter(NAME))
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert torch.equal(what_is_read(folder), tiny.get_parameter(NAME))


@pytest.mark.parametrize(("name", "said"), [
    ("model-00001-of-00002.safetensors", r"it has model-00001-of-00002\.safetensors, but no model\.safetensors\.index"),
    ("model.fp16.safetensors", r"it has model\.fp16\.safetensors; rename that to model\.safetensors"),
    ("weights.safetensors", r"it has weights\.safetensors, and looks for model\.safetensors"),
    ("sub/model.safetensors", "its subfolder sub has; name that folder")])
def test_weights_that_transformers_would_not_load_are_named(folder: Path, name: str, said: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(RequestError, match=said):
        weight_files(folder)


def test_a_model_in_a_subfolder_is_pointed_to(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"it has no config\.json; its subfolder model has one"):
        resolve(str(folder.parent))


def with_entry(path: Path, entry: object, extra: int = 8) -> None:
    """Add a tensor to a file's header, and bytes to its end."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header["model.layers.0.mlp.up_proj.scales"] = entry
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:] + bytes(extra))


@pytest.mark.parametrize("kind", ["U32", "F8_E8M0", "F4", "nonsense"])
def test_kinds_of_numbers_that_only_packed_weights_have(folder: Path, kind: str) -> None:
    with_entry(folder / "model.safetensors", {"dtype": kind, "shape": [2], "data_offsets": [0, 8]})
    with pytest.raises(RequestError, match=f"up_proj.scales as {kind}, .* is quantized already; start from the unq"):
        resolve(str(folder))


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
    {"dtype": "F32", "shape": [2], "data_offsets": [0]}, {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2]}, [], None, 7, {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}])
def test_headers_that_contradict_themselves(folder: Path, entry: object) -> None:
    with_entry(folder / "model.safetensors", entry)
    with pytest.raises(RequestError, match=r"model\.safetensors is not a safetensors file"):
        read_header(folder / "model.safetensors")


def test_a_path_is_a_name(folder: Path) -> None:
    assert inside_run(folder) == inside_run(str(folder)) == str(folder)
