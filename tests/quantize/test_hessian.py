"""Sink weights: a token of weight w counts as w tokens."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from sinkquant.artifacts import Calibration, WeighedSink
from sinkquant.models import Decoder, Walk
from sinkquant.quantize.hessian import Hessian, collect
from sinkquant.quantize.statistics import TokenWeights


def boosted(rows: torch.Tensor, sinks: list[WeighedSink]) -> TokenWeights:
    return TokenWeights(rows, Calibration(text=None, rows=len(rows), length=rows.shape[1], bos="auto", batch_size=2,
                                          sinks=sinks, damping=0.01, act_order=True))


def test_a_weight_of_w_is_w_copies() -> None:
    inputs = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weighted, copied = Hessian(6, torch.device("cpu")), Hessian(6, torch.device("cpu"))
    weighted.add(inputs, torch.tensor([5.0] + [1.0] * 9))
    copied.add(torch.cat([inputs[:1].expand(5, -1), inputs[1:]]), torch.ones(14))
    assert torch.allclose(weighted.mean(), copied.mean(), rtol=1e-5)
    repeated = torch.cat([inputs[:1].expand(5, -1), inputs[1:]])
    assert torch.allclose(copied.mean(), repeated.T @ repeated / 14, rtol=1e-5, atol=1e-6)


def test_selectors_choose_a_position_a_token_or_both() -> None:
    rows = torch.tensor([[1, 7, 4, 4], [1, 4, 1, 9]])
    sinks = [WeighedSink(token_id=1, position=0, weight=16), WeighedSink(token_id=4, position=None, weight=3),
             WeighedSink(token_id=None, position=1, weight=2)]
    assert boosted(rows, sinks).weights.tolist() == [[16, 2, 3, 3], [16, 3, 1, 1]]
    assert boosted(rows, []).weights.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_the_walk_gives_every_linear_the_hessian_of_its_weighted_inputs(family: str) -> None:
    decoder = Decoder.of(tiny_model(family))
    rows = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(0))
    rows[2, 5], rows[:, 1:5] = 2, 50
    weights = boosted(rows, [WeighedSink(token_id=None, position=0, weight=16),
                             WeighedSink(token_id=2, position=5, weight=4)])
    name = next(name for name in decoder.linears if ".1." in name and name.endswith(("up_proj", "fc1", "o_proj")))
    seen: list[torch.Tensor] = []
    handle = decoder.linears[name].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        decoder.model(rows, use_cache=False)
    handle.remove()
    inputs, flat = torch.cat(seen).double(), weights.weights.flatten().double()
    expected = (inputs * flat[:, None]).T @ inputs / flat.sum()
    for step in Walk(decoder, rows, 2).steps():
        if step.index == 1:
            hessians = collect(step, {name: decoder.linears[name]}, weights)
    assert torch.allclose(hessians[name].mean(), expected, rtol=1e-4, atol=1e-5)
