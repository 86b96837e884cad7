"""A number format from outside the package goes from a recipe to a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import model_folder, small_recipe

import sinkquant as sq
from sinkquant import Plan, RequestError
from sinkquant.schemes import find
from sinkquant.schemes.codecs.registry import GROUP as CODECS
from sinkquant.schemes.registry import GROUP as SCHEMES

BLOCKS = ["backend=toy-blocks", "weights.format=blocks", "weights.bits=4", "weights.group_size=16",
          "weights.method=rtn"]
ASKED = ["backend=toy", "weights.format=shifts", "weights.bits=8", "weights.group_size=-1", "weights.method=rtn"]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, schemes: str, codecs: str) -> None:
    """What `pip install` leaves of a package that brings a format."""
    info = folder / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{SCHEMES}]\n{schemes}\n[{CODECS}]\n{codecs}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch,
            "shifts = develop.toy_format.scheme:SHIFTS\nblocks = develop.toy_blocks.scheme:BLOCKS",
            "shifts = develop.toy_format.codec:SHIFT_CODEC\nblocks = develop.toy_blocks.codec:BLOCK_CODEC")


@pytest.mark.usefixtures("installed")
def test_a_format_of_another_package_goes_from_a_recipe_to_a_report(tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, *ASKED, "weights.overrides=[{pattern: '*.2.*', bits: 16}]",
                          "detect.super_weights=false", "evaluate.fidelity=false")
    report = sq.run(recipe, folder, tmp_path / "out")
    assert report is not None
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert (plan.backend, plan.loads_in) == ("toy", ["sinkquant"])
    assert report.row("sink_aware").weight_bytes == plan.weight_bytes
    settings = json.loads((tmp_path / "out" / "model" / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "toy"}
    model, original = (sq.load(path)[0] for path in (tmp_path / "out" / "model", folder))
    name = "model.layers.0.mlp.down_proj.weight"
    given, before = model.get_parameter(name), original.get_parameter(name)
    reach = before.abs().amax(1, keepdim=True)
    assert ((given - before).abs() <= 1.001 * reach / 127).all()  # half a step of up to two times the reach
    assert not torch.equal(given, before)
    assert torch.equal(model.get_parameter("model.layers.2.mlp.down_proj.weight"),
                       original.get_parameter("model.layers.2.mlp.down_proj.weight"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("rows", [[], ["weights.smooth=awq"]], ids=["rounded", "calibrated"])
def test_fused_linears_share_the_scale_of_the_tensor(rows: list[str], tmp_path: Path, text_file: Path) -> None:
    folder = model_folder(tmp_path / "model")
    recipe = small_recipe(text_file, *BLOCKS, *rows, "detect.super_weights=false", "evaluate.skip=true")
    sq.run(recipe, folder, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model" / "model.safetensors")
    attention = [stored[f"model.layers.1.self_attn.{name}_proj.weight_global_scale"] for name in "qkvo"]
    assert torch.equal(attention[0], attention[1])
    assert torch.equal(attention[0], attention[2])
    assert not torch.equal(attention[0], attention[3])
    model, original = (sq.load(path)[0] for path in (tmp_path / "out" / "model", folder))
    given, before = (one(torch.arange(64)[None]).logits for one in (model, original))
    error = (given - before).square().mean() / before.square().mean()
    assert 1e-4 < error < 0.05  # a weight's is 0.01


@pytest.mark.usefixtures("installed")
def test_what_it_does_not_hold_is_refused_as_of_any_other(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"weights\.bits is 4, and toy holds 8 bits"):
        sq.run(small_recipe(text_file, *ASKED, "weights.bits=4"), model_folder(tmp_path / "model"), tmp_path / "out")


def test_without_its_package_it_is_refused_by_name(text_file: Path) -> None:
    with pytest.raises(RequestError, match=r"a backend is one of compressed-tensors, bitsandbytes, .*, not"):
        small_recipe(text_file, *ASKED)
    with pytest.raises(RequestError, match="there is no storage 'shifts' of weights; install the package"):
        find("shifts")


@pytest.mark.parametrize(("schemes", "codecs", "message"), [
    ("shifts = develop.toy_format.codec:torch", "", r"'shifts' of sinkquant\.schemes is no .*Scheme; mend the package"),
    ("moved = develop.toy_format.scheme:SHIFTS", "", "is a scheme with the storage 'shifts'; mend the package"),
    ("shifts = develop.toy_format.scheme:SHIFTS", "", r"no package brings a codec of 'shifts'"),
    ("shifts = develop.toy_format.scheme:SHIFTS", "shifts = develop.toy_format.scheme:SHIFTS",
     r"'shifts' of sinkquant\.codecs is no .*Codec; mend the package")])
def test_a_package_that_brings_something_else_is_named(schemes: str, codecs: str, message: str, tmp_path: Path,
                                                       text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, schemes, codecs)
    with pytest.raises(RequestError, match=message):
        sq.run(small_recipe(text_file, *ASKED), model_folder(tmp_path / "model"), tmp_path / "out")
