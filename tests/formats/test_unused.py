"""Tensors that transformers does not compute with: taken along as they are, or named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import weight_bytes
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from small_runs import model_folder

from sinkquant.errors import RequestError
from sinkquant.formats import load, quantize_to, save
from sinkquant.heads import cut_heads
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model
from sinkquant.policy import make_plan, require_transforms
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

RECIPE = Recipe().replace(["weights.method=rtn", "weights.group_size=32"])
HEAD = "model.layers.3.eh_proj.weight"
OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, a fourth that predicts a second token, and a buffer of an older version."""
    folder = model_folder(tmp_path_factory.mktemp("unused") / "source", dtype=torch.bfloat16)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    fourth = {key.replace("layers.2.", "layers.3."): value.clone()
              for key, value in tensors.items() if "layers.2." in key}
    more = {HEAD: torch.randn(64, 128), "model.layers.3.scale": torch.tensor(3.0), OLD: torch.ones(8)}
    save_file(tensors | fourth | more, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_other_engines_compute_with_is_taken_along(source: Path, tmp_path: Path, in_memory: bool) -> None:
    model, out = load_model(source) if in_memory else open_model(source), tmp_path / "out"
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape(""), sink_map_of(decoder), RECIPE)
    if in_memory:
        save(quantize(model, plan), load_tokenizer(source), out)
    else:
        quantize_to(out, model, plan, load_tokenizer(source))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    kept = {name for name in before if "layers.3." in name}
    assert len(kept) == 11
    assert {name for name in after if "layers.3." in name} == kept
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in kept)
    assert OLD not in after
    assert weight_bytes(out) == plan.weight_bytes
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["num_nextn_predict_layers"] == 1
    assert HEAD.removesuffix(".weight") in config["quantization_config"]["ignore"]
    assert any("layers.3" in note and "and 9 more are taken along" in note for note in plan.notes)
    assert any(OLD in note and "left out" in note for note in plan.notes)
    again, _ = load(out)
    assert "model.layers.3.eh_proj.weight" not in again.state_dict()


def test_what_would_not_fit_any_more_is_refused(source: Path, tmp_path: Path) -> None:
    model = open_model(source)
    decoder = Decoder.of(model)
    with pytest.raises(RequestError, match=r"comes with model\.layers\.3.*a rotation would leave behind"):
        require_transforms(decoder.shape(""), RECIPE.replace(["weights.rotate=full"]))
    sink_map = sink_map_of(decoder)
    with pytest.raises(RequestError, match="it would not fit the smaller heads"):
        cut_heads(model, load_tokenizer(source), sink_map, tmp_path / "out")
