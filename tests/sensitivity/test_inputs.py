"""What rounded inputs are predicted to lose, against forward passes; and plans that are made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from sinkmaps import BOS, sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant import Recipe, find_sensitivity
from sinkquant.artifacts import Plan, Sensitivity, SinkMap
from sinkquant.errors import RequestError
from sinkquant.formats import save
from sinkquant.models import Decoder, token_rows
from sinkquant.models.inputs import input_args, inputs_left_alone, round_inputs
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.policy.headers import plan_ready
from sinkquant.policy.mechanisms import unprotected
from sinkquant.quantize import quantize
from sinkquant.sensitivity.measure import divergence


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random model predicts next to nothing; one with larger logits has a loss to lose."""
    model = tiny_model("llama", num_hidden_layers=2, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def sink_map(model: PreTrainedModel) -> SinkMap:
    return sink_map_of(Decoder.of(model), tokens=(BOS,))


def recipe_of(text: Path, *more: str, name: str = "mxfp4-sink") -> Recipe:
    return Recipe.load(name).replace([
        f"calibration.text={text}", "calibration.rows=4", "calibration.length=16", "sensitivity.rows=48",
        "sensitivity.length=16", "weights.smooth=none", "activations.bits=6", *more])


@pytest.fixture(scope="module")
def found(model: PreTrainedModel, text: Path, sink_map: SinkMap) -> Sensitivity:
    return find_sensitivity(model, tiny_tokenizer(), sink_map, recipe_of(text))


def test_predicted_losses_are_those_of_forward_passes(model: PreTrainedModel, text: Path, found: Sensitivity) -> None:
    assert [unit.modules[0].rpartition("layers.")[2] for unit in found.inputs[:4]] == [
        "0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.gate_proj", "0.mlp.down_proj"]
    assert found.units == []
    wide = tiny_model("llama", num_hidden_layers=2)
    wide.load_state_dict(model.state_dict())
    rows = token_rows(tiny_tokenizer(), text.read_text(), 48, 16)
    linears = Decoder.of(wide).linears
    with torch.no_grad():
        before = torch.log_softmax(wide(rows).logits.float(), -1)
        for unit in found.inputs:
            for loss in unit.losses:
                args = dict.fromkeys(unit.modules, input_args(loss.activations, loss.scale))
                round_inputs(wide, linears, args, {})
                after = torch.log_softmax(wide(rows).logits.float(), -1)
                for name in unit.modules:
                    linears[name]._forward_pre_hooks.clear()
                measured = sum(divergence(a, b) for a, b in zip(before, after, strict=True)) / rows.numel()
                assert loss.total == pytest.approx(measured, rel=0.6), (unit.modules, loss)


def planned(model: PreTrainedModel, sink_map: SinkMap, recipe: Recipe, found: Sensitivity | None) -> Plan:
    return make_plan(Decoder.of(model).shape("tiny"), sink_map, recipe, found)


def test_the_costliest_inputs_are_finer_and_the_budget_is_kept(model: PreTrainedModel, text: Path, sink_map: SinkMap,
                                                               found: Sensitivity, tmp_path: Path) -> None:
    plan = planned(model, sink_map, recipe_of(text), found)
    sizes = {name: linear.parameters for name, linear in Decoder.of(model).shape("").linears.items()}
    costs = {unit.modules[0]: unit.losses[0].total / sum(sizes[name] for name in unit.modules) for unit in found.inputs}
    costly, cheap = (choose(costs, key=lambda name: costs[name]) for choose in (max, min))
    assert plan.modules[costly].activations in ("fp8", "16-bit")
    assert f"its inputs take {plan.modules[costly].activations}" in plan.modules[costly].reason
    assert plan.modules[cheap].activations == "mxfp4"
    assert "its inputs take mxfp4 per group: mxfp4 is predicted to lose" in plan.modules[cheap].reason
    bits = {"mxfp4": 4, "fp8": 8, "16-bit": 16}
    average = sum(bits[plan.modules[name].activations] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 5 < average <= 6
    assert any(f"inputs have {average:.2f} bits on average" in note for note in plan.notes)
    assert {len({plan.modules[name].inputs for name in unit.modules}) for unit in found.inputs} == {1}
    everywhere = planned(model, sink_map, recipe_of(text, "activations.bits=4"), found)
    assert {decision.activations for decision in everywhere.modules.values()} == {"mxfp4"}
    control = make_control(Decoder.of(model).shape("tiny"), sink_map, recipe_of(text), plan, found)
    assert {name: one.inputs for name, one in control.modules.items()} == {
        name: one.inputs for name, one in plan.modules.items()}
    accepted = accept_edited(plan, Decoder.of(model).shape("tiny"))
    assert accepted.modules == plan.modules
    assert any(f"inputs have {average:.2f} bits on average" in note for note in accepted.notes)
    modules = {name: one.model_copy(update={"activations": "fp8", "activation_scale": "token"})
               for name, one in plan.modules.items()}
    edited = accept_edited(plan.model_copy(update={"modules": modules}), Decoder.of(model).shape("tiny"))
    assert [note for note in edited.notes if note.startswith("inputs have")] == [
        "inputs have 8.00 bits on average over the weights that they are multiplied with"]
    # Plain transformers rounds every linear's inputs as its group says.
    mixed = tiny_model("llama", num_hidden_layers=2, dtype=torch.bfloat16)
    mixed.load_state_dict(model.state_dict())
    quantize(mixed, plan, tiny_tokenizer())
    rows = token_rows(tiny_tokenizer(), text.read_text(), 2, 16)
    folder = save(mixed, tiny_tokenizer(), tmp_path / "out")
    with torch.no_grad():
        expected = mixed(rows, use_cache=False).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(rows, use_cache=False).logits, expected)
        with inputs_left_alone(mixed):
            assert not torch.equal(mixed(rows, use_cache=False).logits, expected)


def test_nvfp4_weights_are_multiplied_with_nvfp4_or_16_bits(model: PreTrainedModel, text: Path,
                                                            sink_map: SinkMap) -> None:
    recipe = recipe_of(text, "activations.bits=10", name="nvfp4-sink")
    found = find_sensitivity(model, tiny_tokenizer(), sink_map, recipe)
    assert {loss.activations for unit in found.inputs for loss in unit.losses} == {"nvfp4"}
    plan = planned(model, sink_map, recipe, found)
    assert {decision.inputs for decision in plan.modules.values()} == {("nvfp4", "group"), ("16-bit", None)}
    assert any("its inputs stay in 16 bits: nvfp4 is predicted to lose" in decision.reason
               for decision in plan.modules.values())


@pytest.mark.parametrize(("settings", "message"), [
    (["activations.bits=3"], r"activations\.bits 3 is not feasible: inputs take 4 bits at least"),
    (["weights.smooth=smoothquant"], r"weights\.smooth=smoothquant changes the inputs that activations\.bits"),
    (["activations.format=fp8", "activations.scale=tensor", "activations.bits=8"],
     "fp8 beside MXFP4 weights has a scale per token, not per tensor")])
def test_what_cannot_be_met_is_refused(model: PreTrainedModel, text: Path, sink_map: SinkMap, found: Sensitivity,
                                       settings: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned(model, sink_map, recipe_of(text, *settings), found)


def test_a_budget_of_inputs_asks_for_sensitivities(model: PreTrainedModel, text: Path, sink_map: SinkMap) -> None:
    assert plan_ready(Decoder.of(model).shape("tiny"), recipe_of(text), None, sink_map) == (None, ["activations.bits"])
    with pytest.raises(RequestError, match=r"activations\.bits needs sensitivities of the inputs"):
        planned(model, sink_map, recipe_of(text), None)
    with pytest.raises(RequestError, match=r"activations\.bits takes what inputs lose"):
        unprotected(recipe_of(text))
    with pytest.raises(RequestError, match=r"activations\.bits is for inputs that are rounded"):
        Recipe().replace(["activations.bits=8"])
