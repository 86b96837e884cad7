"""What a backend's files cannot hold is refused before anything is computed, in words that say what to do."""

from __future__ import annotations

import pytest
from backend_cases import BACKEND_CASES
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, check_recipe, make_plan
from sinkquant.recipe import Recipe

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.of(tiny_model("llama"))


def plan_of(decoder: Decoder, kind: str, *more: str) -> Plan:
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, {DOWN: 0.9}),
                     Recipe().replace([*BACKEND_CASES[kind], *more]))


@pytest.mark.parametrize(("settings", "message"), [
    (("backend=bitsandbytes",), "weights.format 'int'|bitsandbytes rounds weights to nearest by itself"),
    (("weights.format=nf4",), "weights.format 'nf4' is not held by the backend compressed-tensors; use int"),
    (("backend=quanto", "weights.format=fp4"), "not held by the backend quanto; use int or float8"),
    (("weights.double_quantization=true",), "double_quantization is for bitsandbytes' nf4 and fp4"),
    ((*BACKEND_CASES["nf4"], "weights.method=gptq"), "so that gptq cannot choose its codes; set weights.method=rtn"),
    ((*BACKEND_CASES["nf4"], "weights.tune=10"), "cannot be tuned; set weights.tune=0"),
    ((*BACKEND_CASES["nf4"], "weights.bits=3"), "weights.bits is 3, and bitsandbytes holds 4 bits"),
    ((*BACKEND_CASES["nf4"], "weights.group_size=32"), "set weights.group_size=64"),
    ((*BACKEND_CASES["nf4"], "protect.channels=module"), "protect.bits is 8, and bitsandbytes holds 4 or 16 bits"),
    ((*BACKEND_CASES["llm.int8"], "weights.group_size=64"), "set weights.group_size=-1"),
    ((*BACKEND_CASES["llm.int8"], "weights.overrides=[{pattern: '*', bits: 4}]"), r"overrides\[0\].bits is 4"),
    ((*BACKEND_CASES["quanto-4"], "weights.bits=3"), "quanto holds 2 or 4 or 8 bits"),
    ((*BACKEND_CASES["quanto-4"], "weights.group_size=64"), "set weights.group_size=128"),
    ((*BACKEND_CASES["quanto-4"], "prune.method=magnitude"), "no code for zero"),
    (("backend=gguf", "weights.format=iq4_nl", "weights.bits=5", "prune.method=wanda", "budget.bits=5.5",
      "budget.solver=sensitivity"), r"4 bits have no code for zero.*use 5 bits \(in sensitivity.bits too\)"),
    ((*BACKEND_CASES["gptq-4"], "weights.bits=5"), "gptq holds 2 or 3 or 4 or 8 bits"),
    ((*BACKEND_CASES["gptq-4"], "weights.overrides=[{pattern: '*', bits: 4, group_size: 64}]"), "one group size"),
    ((*BACKEND_CASES["gptq-4"], "weights.overrides=[{pattern: '*', bits: 8}]"), "gptq holds 4 or 16 bits")])
def test_what_a_backend_cannot_hold_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_recipe(Recipe().replace(settings))


@pytest.mark.parametrize("kind", BACKEND_CASES)
def test_a_plan_says_who_loads_it_and_what_is_left_behind(decoder: Decoder, kind: str) -> None:
    plan = plan_of(decoder, kind, "kv_cache.key_bits=4")
    assert plan.backend == Recipe().replace(BACKEND_CASES[kind]).backend
    assert "sinkquant" in plan.loads_in
    assert not {"transformers"} & set(plan.loads_in)
    assert any(f"other loaders of a {plan.backend} checkpoint keep theirs in 16 bits" in note for note in plan.notes)
    assert Plan.parse(plan.model_dump(mode="json", by_alias=True), "again").to_json() == plan.to_json()


def test_formats_of_another_backend_rise_by_its_own_steps(decoder: Decoder) -> None:
    bits = {d.bits for d in plan_of(decoder, "quanto-2", "budget.bits=7").modules.values()}
    assert bits <= {2, 4, 8, 16}
    assert len(bits) > 1
    assert {d.bits for d in plan_of(decoder, "nf4", "budget.bits=9").modules.values()} == {4, 16}


def test_sink_related_modules_stay_in_16_bits(decoder: Decoder) -> None:
    decision = plan_of(decoder, "nf4", "protect.channels=module", "protect.bits=16").modules[DOWN]
    assert (decision.bits, decision.keep) == (16, "module")
    assert "trace(H)" in decision.reason


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("nf4", {"storage": "fp4"}, "one checkpoint cannot"), ("nf4", {"group_size": 32}, "one checkpoint cannot"),
    ("quanto-4", {"bits": 3}, "does not hold"), ("quanto-4", {"bits": 8, "group_size": 64}, "does not hold"),
    ("quanto-4", {"storage": "pack-quantized", "group_size": 64}, "one checkpoint cannot")])
def test_edited_plans_that_no_checkpoint_can_hold_are_refused(decoder: Decoder, kind: str, change: dict[str, object],
                                                              message: str) -> None:
    content = plan_of(decoder, kind).model_dump(mode="json", by_alias=True)
    content["modules"][DOWN] |= change
    with pytest.raises(RequestError, match=message):
        accept_edited(Plan.parse(content, "edited"), decoder.shape("tiny"))


def test_an_edited_plan_of_another_backend_is_counted_anew(decoder: Decoder) -> None:
    plan = plan_of(decoder, "quanto-4")
    content = plan.model_dump(mode="json", by_alias=True)
    content["modules"][DOWN] |= {"bits": 8, "group_size": -1}
    edited = accept_edited(Plan.parse(content, "edited"), decoder.shape("tiny"))
    assert edited.weight_bytes > plan.weight_bytes
    assert edited.modules[DOWN].storage == "quanto"
