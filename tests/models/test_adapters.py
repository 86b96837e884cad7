"""Adapters are merged into their base as peft does it, or refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub.constants
import pytest
import torch
from gguf_files import write_gguf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_runs import fingerprint
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import adapters, open_model, resolve
from sinkquant.models.decoder import Decoder
from sinkquant.models.shards import stored_tensors
from sinkquant.models.unused import unused_of

if TYPE_CHECKING:  # it takes seconds to import, which only who runs these tests has to spend
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged folders are kept here, and go with the test."""
    monkeypatch.setattr("sinkquant.models.kept.cached_assets_path", lambda *_, **__: tmp_path / "assets")


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, settings: peft.PeftConfig | None = None) -> PreTrainedModel:
    """Writes a random adapter. Returns what peft itself merges."""

    import peft

    model = AutoModelForCausalLM.from_pretrained(base)
    settings = settings or peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
                                           task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, settings)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload() if hasattr(wrapped.base_model, "merge_and_unload") else model


def is_merged(folder: Path, expected: PreTrainedModel) -> bool:
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_an_adapter_is_its_base_with_the_change_merged_in(base: Path, tmp_path: Path) -> None:
    import peft

    expected, before = adapter(base, tmp_path / "lora"), fingerprint(base)
    folder = resolve(str(tmp_path / "lora"))
    assert is_merged(folder, expected)
    assert not is_merged(base, expected)
    assert resolve(str(tmp_path / "lora")) == folder
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    notes = Decoder.of(open_model(folder)).shape("").notes
    assert notes == ["the adapter lora is merged into the weights of base"]
    assert fingerprint(base) == before
    other = adapter(base, tmp_path / "lora", peft.LoraConfig(
        r=2, target_modules=["up_proj"], init_lora_weights=False, use_dora=True, task_type="CAUSAL_LM"))
    assert is_merged(resolve(str(tmp_path / "lora")), other)


def test_an_adapter_of_a_base_that_was_quantized_before_says_so(base: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf/tiny.gguf", "Q8_0")
    adapter(resolve(str(tmp_path / "gguf/tiny.gguf")), tmp_path / "lora")
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gguf/tiny.gguf")}))
    (note,) = Decoder.of(open_model(resolve(str(tmp_path / "lora")))).shape("").notes
    assert note.startswith("the adapter lora is merged into the weights of tiny.gguf, where they were quantized before")


def test_a_disk_without_room_is_refused_and_one_that_fills_ends_in_a_sentence(
        base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(base, tmp_path / "lora")
    write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patched:
        patched.setattr("sinkquant.models.kept.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        for model, message in (("lora", "merging .*lora takes"), ("tiny.gguf", r"unpacking .*tiny\.gguf takes")):
            with pytest.raises(RequestError, match=f"{message} .* set HF_HOME to a folder with room"):
                resolve(str(tmp_path / model))

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    for model in ("lora", "tiny.gguf"):
        with pytest.raises(SinkquantError, match=r"cannot keep what .*No space left .* set HF_HOME"):
            resolve(str(tmp_path / model))


def test_an_adapter_beside_its_base_is_merged_into_what_lies_there(base: Path, tmp_path: Path) -> None:
    expected = adapter(base, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (base / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "no/such-model"}))
    shutil.copy(tmp_path / "lora/adapter_model.safetensors", base)
    folder = resolve(str(base))
    assert is_merged(folder, expected)
    assert not (folder / "adapter_config.json").exists()


def test_what_transformers_does_not_compute_with_stays_beside_what_is_merged(base: Path, tmp_path: Path) -> None:
    expected = adapter(base, tmp_path / "lora")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"mtp.proj.weight": torch.ones(3, 5)}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    folder = resolve(str(tmp_path / "lora"))
    assert is_merged(folder, expected)
    assert list(unused_of(open_model(folder)).carried) == ["mtp.proj.weight"]
    assert torch.equal(stored_tensors(folder)["mtp.proj.weight"][...], torch.ones(3, 5))
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_base_on_the_hub_is_of_the_revision_that_the_adapter_names_and_refused_by_its_configuration(
        base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected, repository = adapter(base, tmp_path / "lora"), tmp_path / "hub/models--owner--tiny"
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "owner/tiny", "revision": "v2"}))
    config = json.loads((base / "config.json").read_text())
    for name, commit in (("main", "0" * 40), ("v2", "1" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(RequestError, match="is an adapter of owner/tiny, whose weights are quantized; name the unquan"):
        resolve(str(tmp_path / "lora"))  # the hub has its weights as well
    shutil.copytree(base, repository / "snapshots" / ("1" * 40), dirs_exist_ok=True)
    folder = resolve(str(tmp_path / "lora"))
    assert is_merged(folder, expected)
    assert Decoder.of(open_model(folder)).shape("").notes == ["the adapter lora is merged into the weights of tiny"]


def test_what_cannot_be_merged_is_refused_in_a_sentence(base: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    adapter(base, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(RequestError, match=match):
            resolve(str(tmp_path / "lora"))

    refused("names no base model", base_model_name_or_path=None)
    refused("is not a model folder, a GGUF file", base_model_name_or_path=str(tmp_path / "gone"))
    refused("peft cannot merge .* into .*", peft_type="NO_SUCH_KIND")
    refused("peft cannot merge .* into .*", target_modules=["no_proj"])
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "installed", lambda _: False)
        refused("peft, which merges it into its base model, is not installed")
    adapter(base, tmp_path / "prompt", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(RequestError, match="of the kind PROMPT_TUNING, which is no change of weights"):
        resolve(str(tmp_path / "prompt"))
    shutil.copy(base / "config.json", tmp_path / "lora")
    shard = tmp_path / "lora/model.safetensors"
    shard.write_bytes((base / "model.safetensors").read_bytes()[:-8])
    refused(r"model\.safetensors is truncated")
    shard.unlink()
    (tmp_path / "lora/adapter_model.safetensors").unlink()
    refused("has adapter_config.json, but no adapter_model.safetensors", base_model_name_or_path="no/such-model")
    assert not [path for path in (tmp_path / "assets").rglob("*.safetensors") if "lora" in str(path)]
