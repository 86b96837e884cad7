"""Budgets that are solved for in one GGUF file: what its own kinds of blocks lose, and their true bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from costs import sensitivity_of
from families import tiny_model
from gguf import GGUFReader
from sinkmaps import sink_map_of
from tiny_bpe import BPE_VOCABULARY, byte_level

from sinkquant.artifacts import Sensitivity
from sinkquant.errors import RequestError
from sinkquant.formats import quantize_to
from sinkquant.models import Decoder, load_tokenizer, open_model
from sinkquant.policy import check_solvable, make_control, make_plan
from sinkquant.recipe import Recipe
from sinkquant.schemes import WeightFormat
from sinkquant.sensitivity import find_sensitivity

DOWN = "model.layers.1.mlp.down_proj"
CURVED = ("backend=gguf", "weights.format=iq4_nl", "weights.group_size=32", "weights.method=rtn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("budget") / "model"
    tiny_model("llama", vocab_size=BPE_VOCABULARY).save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


def in_storage(found: Sensitivity, storage: str) -> Sensitivity:
    units = [unit.model_copy(update={"losses": [one.model_copy(update={"storage": storage}) for one in unit.losses]})
             for unit in found.units]
    return found.model_copy(update={"units": units})


@pytest.mark.parametrize("ends", ["16-bit", "q8_0"])
def test_what_matters_most_gets_more_bits_in_a_file_of_the_size_that_was_asked(ends: str, folder: Path,
                                                                               tmp_path: Path) -> None:
    decoder = Decoder.of(open_model(folder))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, name="tiny")
    costs = in_storage(sensitivity_of(shape, {DOWN: 100.0}, bits=(4, 5, 8)), "gguf-iq4_nl")
    recipe = Recipe().replace([*CURVED, f"weights.ends={ends}"])
    least = make_plan(shape, sink_map, recipe.replace(["budget={bits: 4.5, solver: sensitivity}"]), costs)
    assert set(least.formats.values()) == {WeightFormat(4, 32, storage=least.modules[DOWN].storage)}
    for more in (0, 6_000):
        within = recipe.replace([f"budget={{bytes: {least.weight_bytes + more}, solver: sensitivity}}"])
        plan = make_plan(shape, sink_map, within, costs)
        assert plan.weight_bytes <= least.weight_bytes + more
        assert (plan.weight_bytes == least.weight_bytes) == (not more)
    assert {form.bits for form in plan.formats.values()} == {4, 5, 8}
    assert plan.modules[DOWN].bits == 8
    assert plan.predicted["kl"] < least.predicted["kl"]
    assert make_control(shape, sink_map, within, plan, costs).weight_bytes == pytest.approx(plan.weight_bytes, rel=0.01)
    quantize_to(tmp_path / "out", open_model(folder), plan, load_tokenizer(folder))
    file = tmp_path / "out" / "model.gguf"
    assert file.stat().st_size == plan.weight_bytes
    kinds = {one.name: one.tensor_type.name for one in GGUFReader(file).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert {"IQ4_NL", "Q5_0"} < set(kinds.values())


def test_a_kind_is_tried_on_its_own_grid(folder: Path, text_file: Path) -> None:
    model = open_model(folder)
    decoder = Decoder.of(model)
    recipe = Recipe().replace([*CURVED, f"calibration.text={text_file}", "sensitivity.rows=2", "sensitivity.length=16"])
    found = find_sensitivity(model, load_tokenizer(folder), sink_map_of(decoder, name="tiny"), recipe)
    form = WeightFormat(4, 32, storage="gguf-iq4_nl-q8_0")
    for unit in found.units:
        assert [(one.bits, one.storage) for one in unit.losses] == [(bits, "gguf-iq4_nl") for bits in (4, 5, 8)]
        assert unit.losses[0].diagonal > unit.losses[1].diagonal > unit.losses[2].diagonal
        assert unit.loss(form) == unit.losses[0]
        assert unit.loss(WeightFormat(4, 32)) is None
    straight = recipe.replace(["weights.format=int"])
    other = find_sensitivity(model, load_tokenizer(folder), sink_map_of(decoder, name="tiny"), straight)
    assert other.key != found.key
    assert all(one.losses[0].diagonal > two.losses[0].diagonal and one.losses[1].diagonal == two.losses[1].diagonal
               for one, two in zip(other.units, found.units, strict=True))


def test_bits_that_no_kind_of_block_has_are_refused(folder: Path) -> None:
    decoder = Decoder.of(open_model(folder))
    shape = decoder.shape("tiny")
    recipe = Recipe().replace([*CURVED, "sensitivity.bits=[2,3]", "budget.bits=5", "budget.solver=sensitivity"])
    with pytest.raises(RequestError, match=r"have 4 or 5 or 8 bits, and sensitivity\.bits names none"):
        find_sensitivity(open_model(folder), load_tokenizer(folder), sink_map_of(decoder, name="tiny"), recipe)
    with pytest.raises(RequestError, match="loads no candidate format"):
        make_plan(shape, sink_map_of(decoder, name="tiny"), recipe, sensitivity_of(shape))


def test_a_budget_takes_the_embedding_and_the_head_as_the_recipe_stores_them() -> None:
    recipe = Recipe().replace([*CURVED, "budget.bytes=4000000", "budget.solver=sensitivity",
                               "sensitivity.end_bits=[8]"])
    with pytest.raises(RequestError, match=r"end_bits is for .* a budget counts both as weights\.ends stores them"):
        check_solvable(recipe)
