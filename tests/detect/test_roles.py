"""Roles of heads: each from attention that is written by hand, none in random models, mixing control where it is
planted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from families import FAMILIES, tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant import Recipe, detect
from sinkquant.artifacts.findings import further
from sinkquant.artifacts.heads import HeadRole
from sinkquant.detect.roles import RoleTable, roles_of
from sinkquant.models import AttentionRecord, AttentionRows, Decoder, Step, Walk

LENGTH, SWITCH = 64, 7
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def rows_of(count: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 24, (count, LENGTH), generator=generator)
    rows[:, 0] = 1
    return rows


def roles(probabilities: torch.Tensor, rows: torch.Tensor) -> list[HeadRole]:
    """Of attention [rows, heads, length, length] whose sink is the first position."""
    sinks = torch.zeros_like(rows, dtype=torch.bool)
    sinks[:, 0] = True
    table = RoleTable(rows, sinks)
    for batch in (slice(0, len(rows) // 2), slice(len(rows) // 2, len(rows))):
        table.step = cast(Step, SimpleNamespace(batch=batch))
        for start in (0, LENGTH // 2):
            chunk = slice(start, start + LENGTH // 2)
            table.attention_rows(AttentionRows(0, start, probabilities[batch, :, chunk], CAUSAL[chunk]))
        table.attention(cast(AttentionRecord, None))
    table.close_layer()
    (found,) = roles_of(table, 0, str)
    return found


def test_every_role_is_told_from_what_a_head_attends_to() -> None:
    rows = rows_of()
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(len(rows), LENGTH, LENGTH, generator=generator)
    even = torch.softmax(torch.where(CAUSAL, scores, -torch.inf), -1)
    sink = torch.zeros_like(even)
    sink[..., 0] = 1
    before = torch.diag_embed(torch.ones(LENGTH - 1), -1).expand_as(even)
    noise = torch.rand(len(rows), LENGTH, 1, generator=generator)
    at, after = (rows == SWITCH)[..., None].float(), (rows.roll(1, dims=1) == SWITCH)[..., None].float()
    heads = {
        "rests": 0.9 * sink + 0.1 * even,
        "wakes at": at * even + (1 - at) * (0.9 * sink + 0.1 * before),
        "wakes after": after * even + (1 - after) * (0.8 * sink + 0.2 * even),
        "looks back": 0.1 * sink + 0.1 * even + 0.8 * before,
        "reads": even,
        "rests by chance": (noise > 0.4) * sink + (noise <= 0.4) * even,
    }
    found = dict(zip(heads, roles(torch.stack(list(heads.values()), 1), rows), strict=True))
    assert {name: one.role for name, one in found.items()} == {
        "rests": "mixing", "wakes at": "switched", "wakes after": "switched", "looks back": "positional",
        "reads": "information", "rests by chance": "information"}
    for name, condition in (("wakes at", "token"), ("wakes after", "previous")):
        assert (found[name].condition, found[name].tokens) == (condition, [str(SWITCH)])
        assert found[name].explained > 0.9 > 5 * found[name].explained_null
    assert found["rests by chance"].explained < 2 * found["rests by chance"].explained_null
    back = found["looks back"]
    assert back.offset == 1
    assert back.offset_share == pytest.approx(0.8 / 0.9, abs=0.02)
    assert back.offset_null < 0.1
    assert found["rests"].rests == 1


def walked(model: PreTrainedModel, rows: torch.Tensor) -> list[list[HeadRole]]:
    sinks = torch.zeros_like(rows, dtype=torch.bool)
    sinks[:, 0] = True
    table = RoleTable(rows, sinks)
    for step in Walk(Decoder.of(model), rows, 8, observers=[table]).steps():
        table.step = step
        step.run()
        table.close_layer()
    return roles_of(table, 0, str)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_random_models_every_head_reads_information(family: str) -> None:
    found = walked(tiny_model(family), rows_of(16))
    assert [len(layer) for layer in found] == [4, 4, 4]
    assert {one.role for layer in found for one in layer} == {"information"}


def test_planted_heads_hold_mixing_back(text_file) -> None:
    model = plant(tiny_model("llama", num_hidden_layers=4),
                  Plant(token_id=1, position=0, heads=frozenset({1, 2}), channel=7, birth=1))
    recipe = Recipe().replace([f"calibration.text={text_file}", "detect.long_rows=0", "detect.super_weights=false"])
    sink_map = detect(model, tiny_tokenizer(), recipe=recipe)
    for layer, row in enumerate(sink_map.head_roles):
        assert [head for head, one in enumerate(row) if one.role == "mixing"] == ([1, 2] if layer > 1 else [])
    assert "Heads: 4 hold mixing back (mixing), 12 read information (information)" in list(further(sink_map))
