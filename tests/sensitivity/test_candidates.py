"""Which formats are tried: with sink columns beside the codes where the recipe would keep them so."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of

from sinkquant import Recipe
from sinkquant.models import Decoder
from sinkquant.sensitivity.candidates import errors, units_of

DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.gate_proj"
DECODER = Decoder.of(tiny_model("llama"))
SINKS = sink_map_of(DECODER, {DOWN: 0.6, GATE: 0.5})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_sink_columns_are_tried_beside_the_codes(method: str) -> None:
    recipe = Recipe().replace(["weights.group_size=32", f"weights.method={method}", "sensitivity.bits=[2,4]",
                               "protect.channels=split", "protect.max_share=1", "weights.scale_search=false"])
    units = {unit.modules[0]: unit for unit in units_of(DECODER, recipe, SINKS)}
    assert [(one.bits, one.columns) for one in units[DOWN].candidates] == [(2, ()), (2, (3,)), (4, ()), (4, (3,))]
    assert units[GATE].candidates == units[DOWN].candidates
    assert all(not one.columns for name, unit in units.items() if name not in (DOWN, GATE) for one in unit.candidates)
    columns = DECODER.weight(DOWN).shape[1]
    hessian = torch.eye(columns, dtype=torch.float64)
    for one, changes in errors(DECODER, [DOWN], hessian, units[DOWN].candidates, recipe, torch.float32):
        worst = float(changes[DOWN][:, 3].abs().max() / DECODER.weight(DOWN)[:, 3].abs().max())
        assert (worst < 2**-8) == bool(one.columns)
    plain = units_of(DECODER, recipe.replace(["protect.channels=none"]), SINKS)
    assert all(not one.columns for unit in plain for one in unit.candidates)
