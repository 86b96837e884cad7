"""Which inputs are rounded how, and the reason; what cannot be had is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from costs import sensitivity_of
from families import tiny_model
from sinkmaps import BOS, sink_map_of

from sinkquant.artifacts import Plan
from sinkquant.artifacts.sensitivity import InputLoss, InputSensitivity
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_control, make_plan, plan_from_shapes
from sinkquant.recipe import Recipe

DOWN, GATE, UP = (f"model.layers.1.mlp.{leaf}_proj" for leaf in ("down", "gate", "up"))
STATIC = ("activations.format=int8", "activations.scale=tensor", "weights.bits=8", "weights.group_size=-1")
PREFIX = "kv_cache={key_bits: 16, value_bits: 16, prefix: bos}"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.of(tiny_model("llama"))


def planned(decoder: Decoder, *assignments: str) -> Plan:
    """Sinks set the input ranges of DOWN and GATE."""
    recipe = Recipe().replace(["weights.group_size=32", *assignments])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, {DOWN: 0.6, GATE: 0.2}, (BOS,)), recipe)


def test_per_token_everywhere_and_what_it_loads_in(decoder: Decoder) -> None:
    for weights, engines in ((("weights.bits=8", "weights.group_size=-1"), ["transformers", "vllm"]),
                             (("weights.bits=4",), ["transformers", "vllm-cuda"]),
                             (("weights.bits=8",), ["transformers", "vllm-cuda"])):
        plan = planned(decoder, "activations.format=int8", *weights)
        assert {d.inputs for d in plan.modules.values()} == {("int8", "token")}
        assert plan.loads_in == engines
        assert not plan.needs_rows or "gptq" in {d.method for d in plan.modules.values()}


@pytest.mark.parametrize(("policy", "others"), [("dynamic", ("int8", "token")), ("16-bit", ("16-bit", None)),
                                                ("all", ("int8", "tensor"))])
def test_linears_whose_range_the_sinks_set(decoder: Decoder, policy: str, others: tuple[str, str | None]) -> None:
    plan = planned(decoder, *STATIC, f"activations.sinks={policy}")
    for name, decision in plan.modules.items():
        mine = name in (DOWN, GATE, UP)  # UP is fused with GATE
        assert decision.inputs == (others if mine else ("int8", "tensor")), name
        assert ("sinks set their range (90 against 4 elsewhere)" in decision.reason) == (mine and policy != "all")
    assert plan.needs_rows
    assert plan.loads_in == ["transformers", "vllm"]
    wider = planned(decoder, *STATIC, f"activations.sinks={policy}", "activations.range_ratio=30",
                    "activations.typical_ratio=1000")
    assert {d.inputs for d in wider.modules.values()} == {("int8", "tensor")}


def test_linears_that_one_stored_scale_would_drown(decoder: Decoder) -> None:
    sink_map = sink_map_of(decoder, {}, (BOS,))
    sink_map.modules[DOWN].input_typical = 0.09  # of 4: 44.4 times
    for ratio, scale in (("44", "token"), ("45", "tensor")):
        recipe = Recipe().replace([*STATIC, f"activations.typical_ratio={ratio}"])
        plan = make_plan(decoder.shape("tiny"), sink_map, recipe)
        assert plan.modules[DOWN].inputs == ("int8", scale)
        assert plan.modules[GATE].inputs == ("int8", "tensor")
    floats = make_plan(decoder.shape("tiny"), sink_map, Recipe().replace(
        [*STATIC, "activations.format=fp8", "weights.method=rtn"]))
    assert floats.modules[DOWN].inputs == ("fp8", "tensor")
    sink_map.modules[DOWN].input_typical = None  # not recorded
    plan = make_plan(decoder.shape("tiny"), sink_map, Recipe().replace(STATIC))
    assert plan.modules[DOWN].inputs == ("int8", "tensor")


def test_a_range_of_44_times_the_typical_input_leaves_it_one_percent_of_noise() -> None:
    """The reason of the default: int8 with evenly spaced codes."""
    inputs = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = Recipe().activations.typical_ratio * float(inputs.square().mean()) ** 0.5 / 127.5
    noise = ((inputs / step).round() * step - inputs).square().mean() / inputs.square().mean()
    assert float(noise) == pytest.approx(0.01, rel=0.05)


def test_the_control_counts_sinks_as_any_token(decoder: Decoder) -> None:
    recipe = Recipe().replace([*STATIC, "activations.sinks=exclude", PREFIX])
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, {DOWN: 0.6}, (BOS,))
    aware = make_plan(shape, sink_map, recipe)
    control = make_control(shape, sink_map, recipe, aware)
    assert (aware.calibration.ranges, control.calibration.ranges) == ("exclude", "all")
    assert {d.inputs for d in control.modules.values()} == {("int8", "tensor")}
    assert control.weight_bytes == aware.weight_bytes
    assert "clips the sinks" in aware.notes[0]
    assert control.kv_cache is not None
    assert not control.kv_cache.prefix


def test_a_plan_of_stored_scales_asks_for_detection(decoder: Decoder) -> None:
    shape = decoder.shape("tiny")
    settings = [*STATIC, "protect.tokens=false", "weights.method=rtn"]
    assert plan_from_shapes(shape, Recipe().replace(settings))[1] == ["activations.sinks"]
    assert plan_from_shapes(shape, Recipe().replace([*settings, "activations.sinks=all"]))[1] == []


def test_simulated_inputs_say_so(decoder: Decoder) -> None:
    plan = planned(decoder, "activations.format=int4")
    assert plan.inputs_in_words() == "int4 per token, simulated"
    assert plan.notes == ["int4 activations are simulated: sinkquant rounds inputs when it evaluates, no engine does, "
                          "and the checkpoint holds the quantized weights alone"]
    assert plan.weight_bytes == planned(decoder).weight_bytes


@pytest.mark.parametrize(("assignments", "message"), [
    (("activations.format=fp8",), r"FP8 inputs are multiplied with FP8 weights .* set weights.bits=8"),
    (("activations.format=fp8", "weights.bits=8", "weights.group_size=-1"), r"set weights.method=rtn"),
    (("activations.format=fp8", "weights.bits=8", "weights.group_size=-1", "weights.method=rtn", "weights.tune=3"),
     r"set weights.tune=0"),
    (("activations.format=int8", "activations.scale=group"), r"a scale per token or tensor, not per group; set"),
    (("backend=gptq", "activations.format=int8"), "gptq checkpoints cannot ask for inputs in int8; set activations"),
    (("backend=bitsandbytes", "weights.format=nf4", "weights.method=rtn", "activations.format=int8"),
     "bitsandbytes checkpoints cannot ask for inputs in int8"),
    (("activations.format=int8", "weights.ignore=['*']", "kv_cache={key_bits: 2}"), "leaves all weights alone"),
    ((*STATIC, "activations.sinks=exclude"), "set kv_cache.prefix=bos or found"),
    ((*STATIC, "activations.sinks=exclude", "kv_cache={key_bits: 2}"), "set kv_cache.prefix=bos or found")])
def test_what_cannot_be_had_is_refused(decoder: Decoder, assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        planned(decoder, *assignments)


@pytest.mark.parametrize(("change", "message"), [
    ({"activation_scale": None}, "goes with null"), ({"activations": "16-bit"}, "goes with null"),
    ({"bits": 16, "group_size": None, "method": "none"}, "whose weights stay in 16 bits"),
    ({"activation_scale": "group"}, "they have one per token or tensor"),
    ({"activations": "fp8"}, "'fp8' goes with 'float'"), ({"kind": "float"}, "'fp8' goes with 'float'"),
    ({"kind": "float", "activations": "fp8"}, "take 8 bits, group_size -1")])
def test_an_edited_plan_that_makes_no_sense_is_refused(decoder: Decoder, change: dict[str, Any],
                                                       message: str) -> None:
    plan = planned(decoder, "activations.format=int8")
    plan.modules[DOWN] = plan.modules[DOWN].model_copy(update=change)
    with pytest.raises(RequestError, match=message):
        accept_edited(plan, decoder.shape("tiny"))


def test_an_edited_plan_is_counted_anew(decoder: Decoder) -> None:
    shape, plan = decoder.shape("tiny"), planned(decoder, *STATIC, "activations.sinks=all")
    assert accept_edited(plan, shape).model_dump() == plan.model_dump()
    plan.modules[DOWN] = plan.modules[DOWN].model_copy(update={"activation_scale": "token"})
    counted = accept_edited(plan, shape)
    assert counted.modules[DOWN].bytes == plan.modules[DOWN].bytes - 2
    plan.modules[GATE] = plan.modules[GATE].model_copy(update={"activation_scale": "token"})
    with pytest.raises(RequestError, match="give both the same bits, group_size, activations"):
        accept_edited(plan, shape)
    plan = planned(decoder, *STATIC, "activations.sinks=exclude", PREFIX)
    with pytest.raises(RequestError, match="a prefix that its kv_cache does not have"):
        accept_edited(plan.model_copy(update={"kv_cache": None}), shape)


def test_inputs_of_another_models_sensitivities_are_refused(decoder: Decoder) -> None:
    recipe = Recipe().replace(["weights.group_size=32", "activations={format: int8, bits: 9}"])
    losses = [InputLoss(activations="int8", scale="token", sinks=0, total=1)]
    costs = sensitivity_of(decoder.shape("tiny")).model_copy(update={"inputs": [
        InputSensitivity(modules=["model.layers.9.self_attn.q_proj"], losses=losses)]})
    with pytest.raises(RequestError, match="of another model: it has no model"):
        make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe, costs)
