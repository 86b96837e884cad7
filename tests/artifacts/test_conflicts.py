"""Edited plans whose decisions do not go together are refused when they are read, and before any compute."""

from __future__ import annotations

from typing import Any

import pytest
from backend_cases import BACKEND_CASES
from families import tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.policy import accept_edited, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

DOWN, OUT = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
PRUNED = {"prune": {"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}}
SILENCED = [{"layer": 0, "head": 1, "module": OUT, "start": 16, "stop": 32, "reason": "no-op"}]


def edited(name: str, module: dict[str, Any], tune: int, silenced: bool, *assignments: str) -> tuple[Decoder, Plan]:
    decoder = Decoder.of(tiny_model("llama"))
    content = make_plan(decoder.shape("tiny"), sink_map_of(decoder, {DOWN: 0.9}),
                        Recipe().replace(assignments)).model_dump(mode="json", by_alias=True)
    content["modules"][name] |= module
    content["calibration"]["tune"] = tune
    content["silenced_heads"] = SILENCED if silenced else []
    return decoder, Plan.parse(content, "edited")


@pytest.mark.parametrize(("assignments", "module", "tune", "silenced", "message"), [
    (("protect.channels=split", "protect.max_share=1", "weights.group_size=32"), PRUNED, 0, False,
     f"both prunes and splits {DOWN}"),
    (BACKEND_CASES["quanto-4"], PRUNED, 0, False, "of 4 bits have no code for zero; give it 8 bits"),
    (BACKEND_CASES["quanto-4"], {}, 0, True, "no code for zero"),
    (BACKEND_CASES["nf4"], {}, 2, False, "are not tuned; set calibration.tune to 0"),
    ((*BACKEND_CASES["gptq-4"], "weights.symmetric=false"), {}, 2, False, "zero points in GPTQ.* are not tuned")])
def test_what_does_not_go_together_is_refused_at_once(assignments: tuple[str, ...], module: dict[str, Any], tune: int,
                                                      silenced: bool, message: str) -> None:
    decoder, plan = edited(DOWN, module, tune, silenced, *assignments)
    with pytest.raises(RequestError, match=message):
        accept_edited(plan, decoder.shape("tiny"))
    with pytest.raises(RequestError, match=message):
        quantize(decoder.model, plan, tiny_tokenizer())
