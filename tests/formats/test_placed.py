"""Device maps and offloading at load, by accelerate: the same logits from wherever the weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantized
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.errors import RequestError
from sinkquant.formats import load, save

ROWS = torch.arange(3, 40)[None]
OFFLOADED: dict[str, Any] = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                             "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
                             "lm_head": "disk"}


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized(text_file, dtype=torch.bfloat16)[0]
    return save(model, tiny_tokenizer(), tmp_path_factory.mktemp("placed") / "out")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS).logits


@pytest.mark.parametrize("kind", ["unquantized", "dense", "packed"])
def test_offloaded_to_the_disk_it_gives_the_same_logits(folder: Path, tiny_folder: Path, tmp_path: Path,
                                                        kind: str) -> None:
    source, packed = tiny_folder if kind == "unquantized" else folder, kind == "packed"
    whole = load(source, packed=packed)[0]
    model = load(source, packed=packed, device_map=OFFLOADED, offload_folder=tmp_path)[0]
    assert model.hf_device_map["model.layers.1"] == "disk"
    held = [*model.model.layers[1].parameters(), *model.model.layers[1].buffers()]
    assert held
    assert all(tensor.is_meta for tensor in held)
    assert torch.equal(logits(model), logits(whole))
    assert all(tensor.is_meta for tensor in held)
    assert torch.equal(model.generate(ROWS, max_new_tokens=3, do_sample=False),
                       whole.generate(ROWS, max_new_tokens=3, do_sample=False))


def test_auto_offloads_what_the_memory_does_not_hold(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for place, (source, limit, packed) in enumerate(((tiny_folder, 300_000, False), (folder, 100_000, True))):
        model = load(source, packed=packed, device_map="auto", max_memory={"cpu": limit},
                     offload_folder=tmp_path / str(place))[0]
        assert "disk" in model.hf_device_map.values()
        assert torch.equal(logits(model), logits(load(source, packed=packed)[0]))


def test_a_map_to_the_cpu_alone_changes_nothing(folder: Path) -> None:
    for packed in (False, True):
        model = load(folder, packed=packed, device_map={"": "cpu"})[0]
        assert torch.equal(logits(model), logits(load(folder, packed=packed)[0]))
        assert (sq.packing(model).kernels if packed else True)


@pytest.mark.parametrize(("settings", "message"), [
    ({"device_map": "everywhere"}, "one of auto, balanced"),
    ({"device_map": "auto", "device": "cuda"}, "give one of them"),
    ({"offload_folder": "x"}, "go with a device map"), ({"device_map": OFFLOADED}, "accelerate does not carry out"),
    ({"device_map": {"": 0}, "packed": True}, "packed for the CPU to 0")])
def test_what_cannot_be_placed_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(folder, **settings)


def test_gptq_packed_takes_optimum_and_gptqmodel(text_file: Path, tmp_path: Path) -> None:
    model = quantized(text_file, dtype=torch.bfloat16, more=("backend=gptq",))[0]
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    with pytest.raises(RequestError, match=r"optimum's GPTQ quantizer, and that needs (optimum\.gptq|gptqmodel)"):
        load(out, packed=True)
    with pytest.raises(RequestError, match="leave head_bits at 16"):
        load(out, packed=True, head_bits=8)
