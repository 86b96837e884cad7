"""Models that were published in FP8 or MXFP4 alone are dequantized on reading, and that is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from small_runs import model_folder, small_recipe
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import sinkquant as sq
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, open_model, resolve
from sinkquant.models.dequantized import from_fp8, from_mxfp4
from sinkquant.run.candidates import reading_notes
from sinkquant.run.measure import evaluate_folder

BLOCK = 48
"""Divides neither 64 nor 128: the last block of a row is smaller."""


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sinkquant.models.kept.cached_assets_path", lambda *_, **__: tmp_path / "assets")
    return tmp_path / "assets"


def in_fp8(folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    """Turn a model's folder into one in FP8; returns what its weights then stand for."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        dense[name] = weight
        if ".layers." not in name or weight.dim() != 2:
            continue
        rows, columns = weight.shape
        size = {"block": (BLOCK, BLOCK), "channel": (1, columns), "tensor": (rows, columns)}[strategy]
        grid = torch.stack([torch.stack([part.abs().max() / 448 for part in row.split(size[1], 1)])
                            for row in weight.float().split(size[0], 0)])
        wide = grid.repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :columns]
        tensors[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
        scale = f"{name}_scale_inv" if strategy == "block" else f"{name}_scale"
        tensors[scale] = grid.reshape(()) if strategy == "tensor" else grid
        tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
        dense[name] = (tensors[name].float() * wide).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"} | (
        {"weight_block_size": [BLOCK, BLOCK]} if strategy == "block" else {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return dense


@pytest.mark.parametrize("strategy", ["block", "channel", "tensor"])
def test_fp8_is_read_as_what_it_stands_for(strategy: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    expected = in_fp8(folder, strategy)
    place = resolve(str(folder))
    found = load_file(place / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert resolve(str(folder)) == place
    assert (place / "tokenizer.json").is_file()
    assert any("FP8" in note for note in Decoder.of(open_model(place)).shape("x").notes)


def test_fp8_is_read_with_what_says_how_or_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    expected = in_fp8(folder, "block")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")

    def inside(**changes: object) -> Path:
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return resolve(str(folder))

    place = inside(text_config={"quantization_config": settings})
    found = load_file(place / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((place / "config.json").read_text(encoding="utf-8"))["text_config"] == {}
    assert any("its fp8 stands for" in note for note in reading_notes(str(folder)))
    for changes in ({}, {"quantization_config": None}):
        with pytest.raises(RequestError, match=r"_proj\.weight in FP8, and config\.json has no quantization_config"):
            inside(**changes)
    with pytest.raises(RequestError, match=r"is quantized \(compressed-tensors, which its text_config says\)"):
        inside(text_config={"quantization_config": {"quant_method": "compressed-tensors"}})


def test_a_run_from_fp8_says_so_and_carries_no_trace_of_it(tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    in_fp8(folder, "block")
    sq.run(small_recipe(text_file, "evaluate.skip=true", "weights.method=rtn", "kv_cache=null"), folder,
           tmp_path / "out")
    plan = sq.Plan.load(tmp_path / "out" / "plan.json")
    assert any("quantized before (FP8)" in note for note in plan.notes)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, name: tensors.pop(f"{name}_scale_inv"), "without a scale beside it"),
    (lambda tensors, name: tensors.update({f"{name}_scale_inv": torch.ones(3, 5)}), "fits no block")])
def test_a_scale_that_is_missing_or_does_not_fit_is_named(change, message: str, tmp_path: Path, assets: Path) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    in_fp8(folder, "block")
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=message):
        resolve(str(folder))
    assert list(assets.iterdir()) == []


def test_stacked_experts_in_fp8_are_what_each_of_them_is() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 5, 8, generator=generator).to(torch.float8_e4m3fn)
    for size, block in (((3, 2, 2), [4, 4]), ((3, 5), None), ((3, 5, 1), None), ((3, 1, 1), None), ((), None)):
        scale = torch.rand(size, generator=generator)
        found = from_fp8("experts", codes, scale, block, torch.bfloat16)
        alone = [from_fp8("x", one, scale[i] if size else scale, block, torch.bfloat16) for i, one in enumerate(codes)]
        assert torch.equal(found, torch.stack(alone))
    with pytest.raises(RequestError, match=r"the scale of experts is \[2, 2, 2\], which fits no block"):
        from_fp8("experts", codes, torch.ones(2, 2, 2), [4, 4], torch.bfloat16)


def test_mxfp4_experts_are_those_that_transformers_computes_with(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tensors, expected = load_file(tmp_path / "model" / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 125, codes.shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(codes, scales)
        assert torch.equal(from_mxfp4(codes, scales, torch.bfloat16), expected[name])
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = load_file(resolve(str(tmp_path / "model")) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(name.endswith(("_blocks", "_scales")) for name in found)
    assert math.prod(found["lm_head.weight"].shape) == 128 * 64


def test_a_checkpoint_in_fp8_is_measured_with_its_own_bytes_and_that_is_said(tmp_path: Path, text_file: Path) -> None:
    base = model_folder(tmp_path / "base", dtype=torch.bfloat16)
    folder = model_folder(tmp_path / "fp8", dtype=torch.bfloat16)
    in_fp8(folder, "block")
    size = (folder / "model.safetensors").stat().st_size
    recipe = small_recipe(text_file, "evaluate.fidelity=false")
    compared = sq.compare([str(folder)], str(base), text=str(text_file), recipe=recipe, sinks=False)
    assert (compared.rows[1].bytes, compared.rows[1].format) == (size, "fp8")
    said = "measured with the dense weights that its fp8 stands for; its inputs, which an engine rounds to FP8 too"
    assert any(said in warning for warning in compared.warnings)
    report = evaluate_folder(folder, recipe, str(base))
    assert report.rows[1].weight_bytes == size
    assert 8 < report.rows[1].bits_per_weight < report.rows[0].bits_per_weight
    assert any(said in note for note in report.notes)
