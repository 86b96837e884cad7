"""Seven things that go wrong, each planted into the bundled model: each must be named first, with what undoing it
removes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.explanation import Explanation
from sinkquant.detect import detect
from sinkquant.models import load_model, load_tokenizer, resolve

DOWN = "model.layers.1.mlp.down_proj"
KEYS = "model.layers.3.self_attn.k_proj"
UP = "model.layers.2.mlp.up_proj"


@dataclass
class Baseline:
    """The bundled model in a folder, and its sinks."""

    model: PreTrainedModel
    folder: Path
    sinks: SinkMap


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("demo") / "model"
    source = resolve("demo")
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fast = sq.Recipe().replace(["detect.super_weights=false", "detect.rows=24", "detect.long_rows=2"])
    return Baseline(model, folder, detect(model, tokenizer, recipe=fast))


def matrix(model: PreTrainedModel, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.data


def clip(model: PreTrainedModel, _: SinkMap) -> None:
    """The largest weight of a down projection, all but gone."""
    weight = matrix(model, DOWN).view(-1)
    weight[weight.abs().argmax()] *= 0.05


def reorder_groups(model: PreTrainedModel, _: SinkMap) -> None:
    """Rounded to 8 bits in groups of 64, whose scales are read one group further."""
    weight = matrix(model, UP)
    groups = weight.view(len(weight), -1, 64)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    weight.copy_(((groups / scales).round() * scales.roll(1, 1)).view_as(weight))


def swap_scales(model: PreTrainedModel, _: SinkMap) -> None:
    """A scale per output channel, in the reverse order."""
    weight = matrix(model, KEYS)
    scales = weight.abs().amax(1, keepdim=True) / 127
    weight.copy_((weight / scales).round() * scales.flip(0))


def zero_sink_column(model: PreTrainedModel, sinks: SinkMap) -> None:
    """A column that the sinks set, in the linear with the fewest of them."""
    name = sink_linear(sinks)
    matrix(model, name)[:, sinks.modules[name].sink_columns[0]] = 0


def sink_linear(sinks: SinkMap) -> str:
    return min((name for name, one in sinks.modules.items() if one.sink_columns),
               key=lambda name: (-sinks.modules[name].sink_energy, name))


def turn_head(model: PreTrainedModel, _: SinkMap) -> None:
    """One head of keys as if it stood one position further."""
    width = model.config.head_dim
    frequencies = model.model.rotary_emb.inv_freq
    cos, sin = frequencies.cos()[:, None], frequencies.sin()[:, None]
    head = matrix(model, KEYS)[width:2 * width]
    one, two = head[:width // 2].clone(), head[width // 2:].clone()
    head[:width // 2], head[width // 2:] = cos * one - sin * two, sin * one + cos * two


def round_embedding(model: PreTrainedModel, _: SinkMap) -> None:
    """Three bits, one scale per token."""
    weight = model.get_input_embeddings().weight.data
    scale = weight.abs().amax(1, keepdim=True) / 3
    weight.copy_((weight / scale).round().clamp(-4, 3) * scale)


def explained(baseline: Baseline, folder: Path, spoil: Callable[[PreTrainedModel, SinkMap], None]) -> Explanation:
    model = copy.deepcopy(baseline.model)
    with torch.no_grad():
        spoil(model, baseline.sinks)
    model.save_pretrained(folder)
    load_tokenizer(baseline.folder).save_pretrained(folder)
    return sq.explain(str(folder), str(baseline.folder), rows=2, length=64, sink_map=baseline.sinks, sinks=False)


@pytest.mark.parametrize(("spoil", "kind", "where", "said"), [
    (clip, "super weight", DOWN, "putting back that one weight"),
    (reorder_groups, "scales", UP, "groups of 64 have wrong scales"),
    (swap_scales, "scales", KEYS, "rows have wrong scales"),
    (zero_sink_column, "sink columns", None, "which the sinks set, is zero"),
    (turn_head, "rope", KEYS, "head 1 by +1"),
    (round_embedding, "embedding", "model.embed_tokens", "is rounded to 3 bits"),
], ids=lambda value: getattr(value, "__name__", None))
def test_what_was_planted_is_named_first(spoil, kind, where, said, baseline, tmp_path):
    found = explained(baseline, tmp_path / "spoiled", spoil)
    first = found.causes[0]
    assert (first.kind, first.where) == (kind, where or sink_linear(baseline.sinks)), found.causes
    assert said in first.sentence
    assert first.removes > 0.9
    assert f"removes {100 * first.removes:.0f} % of the loss" in found.sentence
    assert sum(one.first_order for one in found.modules) == pytest.approx(found.kl, rel=0.05)


def test_a_missing_bos_is_named_first(baseline, tmp_path):
    """The weights are the same; the tokenizer puts nothing in front."""
    folder = tmp_path / "bare"
    baseline.model.save_pretrained(folder)
    load_tokenizer(baseline.folder).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = None
    path.write_text(json.dumps(content), encoding="utf-8")
    found = sq.explain(str(folder), str(baseline.folder), rows=2, length=64, sinks=False)
    assert found.causes[0].kind == "tokenization"
    assert "no <bos>" in found.causes[0].sentence
    assert found.causes[0].removes == pytest.approx(1)
    assert found.kl > 0.01
