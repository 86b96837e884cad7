"""The control: the plan's bytes, spent without any knowledge of sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts.pruning import Pruning
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.policy.budget import evenly_spread
from sinkquant.policy.carried import scheme_for
from sinkquant.recipe import Recipe, recipe_names

SHAPES: dict[str, dict[str, Any]] = {
    "even": {}, "seven blocks": {"num_hidden_layers": 7},
    "odd": {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6},
    "narrow values": {"hidden_size": 160, "intermediate_size": 352, "num_attention_heads": 5,
                      "num_key_value_heads": 1, "num_hidden_layers": 4}}


@pytest.fixture(scope="module", params=SHAPES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder.of(tiny_model("llama", dtype=torch.bfloat16, **SHAPES[request.param]))


def settings() -> list[tuple[str, list[str]]]:
    found = []
    for name in recipe_names():
        if (recipe := Recipe.load(name)).backend != "compressed-tensors" or recipe.budget.solved:
            continue
        if 8 not in scheme_for(recipe).bits:  # of one width: no linear can be raised
            found.append((name, []))
            continue
        for extra in ([], ["protect.bits=16"], ["protect.max_share=0.5"], ["protect.bits=16", "protect.max_share=1"],
                      ["protect.modules=['*.0.*.o_proj']"]):
            found.append((name, ["protect.channels=module", *extra]))
        found.append((name, []))
    return found


def test_the_control_has_the_plans_size_within_one_per_cent_and_protects_nothing(decoder: Decoder) -> None:
    shape = decoder.shape("tiny")
    names = list(shape.linears)
    energies = {names[i]: 0.2 + i / 100 for i in (2, 6, 9, 13)}
    sink_map = sink_map_of(decoder, energies)
    for recipe_name, assignments in settings():
        size = -1 if recipe_name.startswith(("w8", "fp8")) else 32
        packaged = Recipe.load(recipe_name)
        groups = [f"weights.group_size={size}"] if 8 in scheme_for(packaged).bits else []  # blocks have their own
        recipe = packaged.replace([*groups, *assignments])
        aware = make_plan(shape, sink_map, recipe)
        control = make_control(shape, sink_map, recipe, aware)
        gap = abs(control.weight_bytes - aware.weight_bytes) / aware.weight_bytes
        assert gap <= 0.01, (recipe_name, assignments, gap)
        assert set(control.notes) <= set(aware.notes), (recipe_name, control.notes)
        scales = 16 * len(names) / sum(linear.parameters for linear in shape.linears.values())
        static = recipe.activations.scale == "tensor"  # where a scale per token spares a stored one
        assert control.bits_per_weight <= aware.bits_per_weight + static * scales
        assert control.calibration.sinks == []
        assert not any(decision.keep for decision in control.modules.values())
        assert "sink" not in " ".join(decision.reason for decision in control.modules.values()
                                      if decision.reason.startswith("8 bits,"))
        for name, linear in shape.linears.items():
            assert len({(control.modules[m].bits, control.modules[m].group_size)
                        for m in linear.fused_with or [name]}) == 1


def test_the_control_does_not_depend_on_where_the_sinks_are(decoder: Decoder) -> None:
    shape = decoder.shape("tiny")
    recipe = Recipe().replace(["weights.group_size=32", "protect.channels=module", "protect.max_share=0.2"])
    controls = []
    for block in (0, 2):
        sink_map = sink_map_of(decoder, {f"model.layers.{block}.mlp.down_proj": 0.7})
        control = make_control(shape, sink_map, recipe, make_plan(shape, sink_map, recipe))
        controls.append({name: (d.bits, d.group_size) for name, d in control.modules.items()})
    assert controls[0] == controls[1]


def test_without_protection_the_control_has_the_same_formats(decoder: Decoder) -> None:
    shape, recipe = decoder.shape("tiny"), Recipe().replace(["weights.group_size=32"])
    aware = make_plan(shape, sink_map_of(decoder), recipe)
    control = make_control(shape, sink_map_of(decoder), recipe, aware)
    assert control.modules == aware.modules
    assert control.weight_bytes == aware.weight_bytes


def test_a_difference_that_cannot_be_closed_is_said() -> None:
    decoder = Decoder.of(tiny_model("llama", num_hidden_layers=1))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder)
    recipe = Recipe().replace(["weights.bits=8", "weights.group_size=32", "weights.ignore=['*.q_proj', '*.gate_proj']"])
    aware = make_plan(shape, sink_map, recipe)
    larger = {name: d.model_copy(update={"bytes": 4 * d.bytes}) for name, d in aware.modules.items()}
    control = make_control(shape, sink_map, recipe, aware.model_copy(
        update={"modules": larger, "weight_bytes": 4 * aware.weight_bytes}))
    assert "the control's size differs by" in control.notes[0]


def test_an_even_order_favours_no_depth() -> None:
    names = [str(i) for i in range(16)]
    order = evenly_spread(names)
    assert sorted(order) == sorted(names)
    for start in range(0, 16, 4):
        assert len({int(name) // 4 for name in order[start:start + 4]}) == 4


def test_the_control_of_an_edited_plan_is_calibrated_as_the_plan_is() -> None:
    """What a person changed in the plan stands on both sides, so that sinks are all that tells them apart."""
    decoder = Decoder.of(tiny_model("llama"))
    shape, sink_map, recipe = decoder.shape("tiny"), sink_map_of(decoder), Recipe().replace(["weights.group_size=32"])
    plan = make_plan(shape, sink_map, recipe)
    changes = {"rows": 7, "text": "mine.txt", "descent": 0, "damping": 0.1}
    edited = plan.model_copy(update={"calibration": plan.calibration.model_copy(update=changes), "seed": 5})
    control = make_control(shape, sink_map, recipe, edited)
    assert edited.calibration.sinks
    assert control.seed == 5
    assert control.calibration == edited.calibration.model_copy(update={"sinks": [], "statistics": "all"})


def test_the_control_of_an_edited_plan_has_its_transforms() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, {"model.layers.1.mlp.down_proj": 0.6})
    recipe = Recipe().replace(["weights.group_size=32", "weights.smooth=awq", "protect.channels=scale"])
    plan = make_plan(shape, sink_map, recipe)
    assert [one.name for one in plan.transforms] == ["awq", "scale"]
    assert [one.name for one in make_control(shape, sink_map, recipe, plan).transforms] == ["awq"]
    edited = accept_edited(plan.model_copy(update={"transforms": []}), shape)
    assert make_control(shape, sink_map, recipe, edited).transforms == []


def test_the_control_of_an_edited_plan_is_of_its_size_and_pruned_like_it() -> None:
    decoder = Decoder.of(tiny_model("llama", tie_word_embeddings=False))
    shape, sink_map, recipe = decoder.shape("tiny"), sink_map_of(decoder), Recipe().replace(["weights.group_size=32"])
    plan = make_plan(shape, sink_map, recipe.replace(["weights.lm_head=8"]))
    for name, decision in plan.modules.items():
        if "mlp" in name:
            decision.bits, decision.prune = 3, Pruning(method="wanda", sparsity=0.5, pattern="2:4")
    plan.recipe = recipe.model_dump(mode="json")
    edited = accept_edited(plan, shape)
    control = make_control(shape, sink_map, recipe, edited)
    assert abs(control.weight_bytes / edited.weight_bytes - 1) < 0.01
    assert control.notes == edited.notes
    assert [one.prune for one in control.modules.values()] == [one.prune for one in edited.modules.values()]
    fixed = recipe.replace(["weights.overrides=[{pattern: '*', bits: 8}]"])
    assert "fewest bits" in make_control(shape, sink_map, fixed, edited).notes[-1]
