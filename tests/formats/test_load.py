"""Loading: dense again, quiet, and clear about what it cannot read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantized
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.formats import load, read_checkpoint, save
from sinkquant.formats.load import load_dense
from sinkquant.models import Decoder, load_model, open_model
from sinkquant.quantize import quantize


@pytest.fixture(scope="module")
def saved(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model = quantized(text_file)[0]
    return model, save(model, tiny_tokenizer(), tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def copy(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_weights_come_back_dense_quiet_and_exact(saved: tuple[PreTrainedModel, Path],
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    expected, folder = saved
    model, tokenizer = load(folder)
    assert capfd.readouterr().err == ""
    assert not model.training
    assert tokenizer("w9 w10")["input_ids"] == [1, 9, 10]
    found = dict(model.named_parameters())
    assert set(found) == set(dict(expected.named_parameters()))
    assert all(torch.equal(parameter, found[name]) for name, parameter in expected.named_parameters())
    rows = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(rows).logits, expected(rows).logits)
        assert torch.equal(model(rows).logits, model(rows).logits)


def test_bars_come_back_after_loading(saved: tuple[PreTrainedModel, Path]) -> None:
    from compressed_tensors.quantization.lifecycle import apply
    from tqdm import tqdm
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_dense(saved[1])
    assert logging.is_progress_bar_enabled() == before
    assert apply.tqdm is tqdm


def test_what_was_loaded_is_not_quantized_twice(saved: tuple[PreTrainedModel, Path], text_file: Path) -> None:
    plan = quantized(text_file)[1]
    for model in (load(saved[1])[0], load_model(saved[1])):
        with pytest.raises(RequestError, match="quantized already"):
            quantize(model, plan)


def test_another_tools_checkpoint_loads_without_our_file(copy: Path, saved: tuple[PreTrainedModel, Path]) -> None:
    (copy / "sinkquant.json").unlink()
    assert read_checkpoint(copy) is None
    found = dict(load(copy)[0].named_parameters())
    assert all(torch.equal(parameter, found[name]) for name, parameter in saved[0].named_parameters())


@pytest.mark.parametrize("method", ["awq", "eetq"])
def test_other_formats_are_refused_by_name(copy: Path, method: str) -> None:
    edit(copy, quant_method=method)
    with pytest.raises(RequestError, match=rf"quantized in the {method} format, which is not read here"):
        load(copy)


@pytest.mark.parametrize(("method", "message"), [("bitsandbytes", "holds no packed weight"),
                                                 ("gptq", "GPTQ weights of None bits"),
                                                 ("gptq bits", "GPTQ's format, but holds no packed weight"),
                                                 ("quanto", "no readable quanto_qmap.json")])
def test_backends_whose_files_are_not_there_are_refused(copy: Path, method: str, message: str) -> None:
    edit(copy, quant_method=method.split()[0], **({"bits": 4} if "bits" in method else {}))
    with pytest.raises(RequestError, match=message):
        load(copy)


def test_quantized_outputs_and_caches_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())["quantization_config"]
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    for changes, message in (({"output_activations": inputs}, "quantizes what linears give"),
                             ({"input_activations": inputs | {"strategy": "group", "group_size": 32}}, "by group")):
        groups = {name: group | changes for name, group in config["config_groups"].items()}
        edit(copy, config_groups=groups)
        with pytest.raises(RequestError, match=message):
            load(copy)
    edit(copy, config_groups=config["config_groups"], kv_cache_scheme={"num_bits": 8, "type": "float"})
    with pytest.raises(RequestError, match="quantizes its KV cache"):
        load(copy)


def test_transforms_that_are_in_the_weights_are_read_and_those_left_to_be_done_are_refused(copy: Path) -> None:
    done, left = {"targets": ["Linear"], "location": "weight_input"}, {"targets": ["Linear"], "location": "input"}
    edit(copy, transform_config={"config_groups": {"v": {"type": "hadamard", "head_dim": 16, "apply": [done]}}})
    load(copy)
    edit(copy, transform_config={"config_groups": {"v": {"type": "hadamard", "head_dim": 16, "apply": [left, done]}}})
    for opened in (load, open_model):
        with pytest.raises(RequestError, match=r"transforms what its linears compute with .*\('input', its v\)"):
            opened(copy)


@pytest.mark.parametrize("others", [["Linear", "re:.*_proj"], ["Linear"]])
def test_a_linear_that_several_groups_name_is_read_from_disk_as_it_is_loaded(copy: Path, others: list[str]) -> None:
    """Its name counts before a pattern, and that before its class."""
    (group,) = json.loads((copy / "config.json").read_text())["quantization_config"]["config_groups"].values()
    wrong = group | {"targets": others, "weights": group["weights"] | {"num_bits": 8}}
    if len(others) == 1:
        group["targets"] = ["re:.*_proj$"]
    edit(copy, config_groups={"group_0": wrong, "group_1": group})
    model, found = open_model(copy), load(copy)[0].state_dict()
    with Decoder.of(model).present([model]):
        assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_columns_in_an_order_of_their_own_are_not_read_from_disk(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    order = torch.arange(64, dtype=torch.int32).flip(0)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight_g_idx": order}, copy / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(RequestError, match=r"packs model\.layers\.1\.mlp\.up_proj in a way"):
        open_model(copy)


def test_settings_that_make_no_sense_are_refused(copy: Path) -> None:
    edit(copy, config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": "many"}}})
    with pytest.raises(RequestError, match="cannot be loaded"):
        load(copy)


def test_a_configuration_that_says_null_is_of_an_unquantized_model(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "plain"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    expected = load(tiny_folder)[0].state_dict()
    for given in ({}, {"device_map": {"": "cpu"}}):
        found = load(folder, **given)[0].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_missing_tensor_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight_scale"):
        load(copy)


@pytest.mark.parametrize(("file", "text"), [("sinkquant.json", "{"), ("sinkquant.json", "{}"),
                                            ("sinkquant.json", "[]"), ("config.json", "{")])
def test_broken_json_is_refused(copy: Path, file: str, text: str) -> None:
    (copy / file).write_text(text)
    with pytest.raises(RequestError, match=file):
        read_checkpoint(copy) if file == "sinkquant.json" else load(copy)
