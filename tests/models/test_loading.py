"""What is refused before anything is computed, each by one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_model
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import cast_model, check_finite, load_model, load_tokenizer, pick_device, resolve
from sinkquant.models.loading import has_tokenizer


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> None:
    found = resolve(str(folder))
    load_tokenizer(found)
    load_model(found)


def refusal(folder: Path) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(RequestError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_whole_folder_loads(tiny_folder: Path, tiny: PreTrainedModel) -> None:
    model = load_model(resolve(str(tiny_folder)))
    assert not model.training
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert load_tokenizer(tiny_folder)("w8")["input_ids"] == [1, 8]


def test_a_model_is_cast_to_what_loading_in_that_dtype_gives(tiny_folder: Path) -> None:
    found, loaded = cast_model(load_model(tiny_folder), "cpu", torch.bfloat16), load_model(tiny_folder, torch.bfloat16)
    for ours, theirs in ((found.state_dict(), loaded.state_dict()),
                         (dict(found.named_buffers()), dict(loaded.named_buffers()))):
        assert {name: value.dtype for name, value in ours.items()} == {name: one.dtype for name, one in theirs.items()}
        assert all(torch.equal(ours[name], one) for name, one in theirs.items())


def test_demo_is_a_model() -> None:
    assert (resolve("demo") / "config.json").is_file()


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "not a folder"])
def test_no_folder_and_no_hub_id(name: str) -> None:
    with pytest.raises(RequestError, match=r"is not a model folder, a GGUF file, a hub id \(owner/name\) or 'demo'"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="is not a model folder"):
        resolve("owner/name")


def test_a_hub_id_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="'nobody/nothing' is no local folder, and the hub did not give it: ") as e:
        resolve("nobody/nothing")
    assert "\n" not in str(e.value)


def test_copies_of_other_libraries_are_not_downloaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr("sinkquant.models.folder.snapshot_download",
                        lambda _, ignore_patterns, **__: asked.update(ignored=ignore_patterns) or str(tiny_folder))
    resolve("owner/name")
    files = ["model.safetensors", "tokenizer.model", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5",
             "flax_model.msgpack", "rust_model.ot", "consolidated.safetensors", "consolidated-00001.pth"]
    assert list(filter_repo_objects(files, ignore_patterns=asked["ignored"])) == files[:2]


def test_the_gguf_file_of_a_checkpoint_of_ours_is(tiny_folder: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "commit"))
    (folder / "model.safetensors").rename(folder / "model.gguf")
    (folder / "sinkquant.json").write_text("{}", encoding="utf-8")
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("sinkquant.models.folder.snapshot_download",
                        lambda _, **given: asked.append(given) or str(folder))
    with pytest.raises(RequestError, match="no GGUF file of sinkquant's"):  # it was looked at
        resolve("owner/name")
    assert asked[1] == {"revision": "commit", "allow_patterns": "model.gguf", "ignore_patterns": None}


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken"])
def test_a_tokenizer_of_tiktoken_is_one(name: str, tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).touch()
    assert has_tokenizer(tmp_path)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "is not a model folder: it has no config.json" in refusal(folder)


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in refusal(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no safetensors weights" in refusal(folder)


def test_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin; convert it to safetensors first" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard(folder: Path, keep: int) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert "model.safetensors is truncated" in refusal(folder)


def test_a_shard_that_is_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"this is no safetensors at all")
    assert "is not a safetensors file" in refusal(folder)


def test_a_missing_shard(folder: Path, tiny: PreTrainedModel) -> None:
    (folder / "model.safetensors").unlink()
    tiny.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    resolve(str(folder))
    shards[1].unlink()
    assert f"lacks the shard {shards[1].name}" in refusal(folder)


def test_a_broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert "index.json is broken" in refusal(folder)


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = value

    edit_weights(folder, spoil)
    assert "model.layers.2.mlp.down_proj.weight holds NaN or Inf" in refusal(folder)
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = value
    with pytest.raises(RequestError, match=r"model\.norm\.weight holds NaN or Inf"):
        check_finite(model)


@pytest.mark.parametrize(("kind", "words"), [
    ("t5", "encoder-decoder"), ("vit", "no causal language model"), ("nonesuch", "nonesuch")])
def test_architectures_that_are_no_causal_decoder(folder: Path, kind: str, words: str) -> None:
    if kind == "nonesuch":
        edit_config(folder, model_type=kind)
    else:
        AutoConfig.for_model(kind).save_pretrained(folder)
    assert words in refusal(folder)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(RequestError, match="torch sees no CUDA device"):
        pick_device("cuda")


def test_a_tokenizer_that_evaluation_does_not_take_is_refused(tiny_folder: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("sinkquant.models.loading.AutoTokenizer.from_pretrained", lambda _folder, **settings: (
        asked.append(settings), lambda *_, **__: {"input_ids": [1]})[1])
    with pytest.raises(RequestError, match="is read by function, which is none of transformers' own"):
        load_tokenizer(tiny_folder)
    assert asked[0]["mistral_format"] is False
