"""What the walk back shows of every linear: inputs and gradients that give autograd's gradient of its weight."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_mixture, tiny_model
from sinkmaps import sink_map_of
from torch import nn
from transformers import PreTrainedModel

from sinkquant import Recipe, RequestError
from sinkquant.artifacts import Calibration
from sinkquant.models import Decoder, Walk, as_stored
from sinkquant.models.backward import steps_back
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.sensitivity.candidates import units_of
from sinkquant.sensitivity.seen import Seen

ROWS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))


def drawn(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """The labels that the walk back draws with one batch."""
    with torch.no_grad():
        probabilities = torch.softmax(model(ROWS).logits.float().flatten(0, 1), -1)
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def weights_of(rows: torch.Tensor) -> TokenWeights:
    return TokenWeights(rows, Calibration(text=None, rows=3, length=12, bos="auto", batch_size=3, sinks=[],
                                          damping=0.01, act_order=True))


@pytest.mark.parametrize("family", [*FAMILIES, "olmoe", "deepseek_v3"])
def test_gradients_of_outputs_give_those_of_weights(family: str) -> None:
    model = tiny_model(family) if family in FAMILIES else tiny_mixture(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # a random model predicts next to nothing
    decoder = Decoder.of(model)
    units = units_of(decoder, Recipe().replace(["weights.group_size=32"]), sink_map_of(decoder))
    covered = {name for unit in units for name in unit.modules}
    assert covered == {name for name, linear in decoder.shape("").linears.items() if not linear.fixed}
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(ROWS, use_cache=False).logits.float()
    nn.functional.cross_entropy(logits.flatten(0, 1), drawn(model, 7), reduction="sum").backward()
    expected = {name: _gradient(decoder, name) for name in covered}  # the walk back lays them aside
    blocks = []
    for back in steps_back(Walk(decoder, ROWS, 3), 7):
        mine = [unit for unit in units if unit.block == back.step.index]
        seen = Seen(back, decoder, mine, weights_of(ROWS), Recipe())
        blocks.append(back.step.index)
        for unit in mine:
            for name in unit.modules:
                parts, hessian = seen.of(unit, name)
                found = sum((part.gradients.T @ part.inputs for part in parts), torch.zeros(decoder.weight(name).shape))
                torch.testing.assert_close(found, expected[name], rtol=2e-3, atol=1e-4)
                assert hessian.shape[0] == found.shape[1]
                assert all(part.places is not None and len(part.places) == len(part.inputs) for part in parts)
    assert blocks == sorted(blocks, reverse=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def _gradient(decoder: Decoder, name: str) -> torch.Tensor:
    """Autograd's gradient of a linear's weight, [rows, columns]."""
    if name in decoder.experts:
        part = decoder.experts[name]
        whole = getattr(part.module, part.leaf).grad
        return whole[part.index, part.start:part.start + part.rows]
    module = decoder.linears[name]
    return as_stored(module, module.weight.grad)


def test_experts_that_are_added_up_in_another_way_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    decoder = Decoder.of(model)
    units = units_of(decoder, Recipe().replace(["weights.group_size=32"]), sink_map_of(decoder))
    back = next(iter(steps_back(Walk(decoder, ROWS, 3), 7)))
    mine = [unit for unit in units if unit.block == back.step.index]
    experts = decoder.model.get_submodule(next(unit.owner for unit in mine if unit.owner))
    plain = experts.forward
    experts.forward = lambda *args: 2 * plain(*args)
    with pytest.raises(RequestError, match="does not add up its experts by their shares"):
        Seen(back, decoder, mine, weights_of(ROWS), Recipe())
