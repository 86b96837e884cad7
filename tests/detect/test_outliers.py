"""The prefix of outlier tokens: a planted one is found, with `<bos>` behind it, and random models have none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from detect_helpers import small_recipe, write_text
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer

from sinkquant.artifacts import OutlierPrefix
from sinkquant.detect import detect
from sinkquant.models import token_rows

STOP, WORD = Plant(4, None, frozenset({0, 2}), 20, 1), Plant(90, None, frozenset({1}), 22, 1)


def _found(tmp_path: Path, *plants: Plant, family: str = "llama", bos: str = "once",
           **settings: str) -> OutlierPrefix | None:
    model = plant(tiny_model(family), *plants) if plants else tiny_model(family)
    recipe = small_recipe("detect.super_weights=false", *(f"detect.{key}={value}" for key, value in settings.items()))
    return detect(model, tiny_tokenizer(bos), write_text(tmp_path), recipe).outlier_prefix  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_planted_delimiter_comes_before_bos(tmp_path: Path, family: str) -> None:
    found = _found(tmp_path, STOP, family=family)
    assert found is not None
    assert (found.token_ids, found.texts, found.layers) == ([4, 1], [".", "<s>"], 3)
    assert found.largest_ratio > 64


def test_the_count_is_the_mean_per_row_of_the_layer_with_the_most(tmp_path: Path) -> None:
    model, tokenizer = plant(tiny_model("llama"), STOP, WORD), tiny_tokenizer()
    path = write_text(tmp_path)
    found = detect(model, tokenizer, path, small_recipe("detect.super_weights=false")).outlier_prefix
    rows = token_rows(tokenizer, Path(path).read_text(encoding="utf-8"), 4, 192)
    expected, seen = 0, torch.zeros(128, dtype=torch.long)
    inputs: dict[int, torch.Tensor] = {}
    handles = [block.mlp.down_proj.register_forward_pre_hook(lambda _, args, at=at: inputs.update({at: args[0]}))
               for at, block in enumerate(model.model.layers)]
    with torch.no_grad():
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    for values in inputs.values():
        largest = values.double().abs().amax(-1)
        outliers = largest > 64 * largest.median(1, keepdim=True).values
        expected = max(expected, math.ceil(float(outliers.double().sum(1).mean())))
        seen += torch.bincount(rows[outliers], minlength=128)
    assert found is not None
    assert found.count == expected > 2
    assert seen[4] > seen[90] > 0
    assert found.token_ids == [4, 90, 1]


def test_bos_alone_where_only_the_first_token_is_one(tmp_path: Path) -> None:
    found = _found(tmp_path, Plant(1, None, frozenset({0}), 20, 0))
    assert found is not None
    assert (found.token_ids, found.count) == ([1], 1)


def test_rows_without_bos_get_none_behind(tmp_path: Path) -> None:
    found = _found(tmp_path, STOP, bos="none")
    assert found is not None
    assert found.token_ids == [4]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_random_models_have_none(tmp_path: Path, family: str) -> None:
    found = _found(tmp_path, family=family)
    assert found is not None
    assert (found.token_ids, found.count) == ([], 0)
    assert found.largest_ratio < 64


def test_a_threshold_that_nothing_reaches(tmp_path: Path) -> None:
    found = _found(tmp_path, STOP, outlier_ratio="100000")
    assert found is not None
    assert found.token_ids == []


def test_fused_experts_are_not_measured(tmp_path: Path) -> None:
    found = detect(plant(tiny_model("mixtral"), STOP), tiny_tokenizer(), write_text(tmp_path), small_recipe())
    assert found.outlier_prefix is None
    assert any("outlier tokens were not looked for" in note for note in found.notes)
