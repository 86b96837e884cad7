"""Token weights and Hessians by every policy, against definitions in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Calibration, WeighedSink
from sinkquant.models import AttentionRecord, Decoder, Step, Walk
from sinkquant.quantize.hessian import collect
from sinkquant.quantize.statistics import TokenWeights

NAME = "model.layers.0.self_attn.q_proj"
DOT = WeighedSink(token_id=7, position=None, weight=3.0)
BOS = WeighedSink(token_id=1, position=0, weight=16.0)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """[5, 24] random ids with `<s>` in front and a delimiter, id 7, here and there."""
    table = torch.randint(10, 128, (5, 24), generator=torch.Generator().manual_seed(0))
    table[:, 0] = 1
    table[::2, [6, 15]] = 7
    table[1, 3] = 1  # a `<s>` that is not where the sink is
    return table


def settings(statistics: str, *sinks: WeighedSink) -> Calibration:
    """A calibration with this policy."""
    return Calibration.model_validate({
        "text": None, "rows": 5, "length": 24, "bos": "auto", "batch_size": 2, "damping": 0.01, "act_order": True,
        "sinks": [sink.model_dump() for sink in sinks], "statistics": statistics})


class Seen:
    """Records inputs of a linear and the attention that positions receive, in one plain replay."""

    def __init__(self, tiny: PreTrainedModel, rows: torch.Tensor) -> None:
        self.inputs: list[torch.Tensor] = []
        self.received: list[torch.Tensor] = []
        handle = tiny.get_submodule(NAME).register_forward_pre_hook(self.hook)
        with first_step(tiny, rows, self, batch_size=5) as step:
            step.run()
        handle.remove()

    def hook(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.inputs.append(args[0].double())

    def attention(self, record: AttentionRecord) -> None:
        self.received.append(record.received.sum(1).double())


@contextlib.contextmanager
def first_step(tiny: PreTrainedModel, rows: torch.Tensor, *observers: Any, batch_size: int = 2) -> Iterator[Step]:
    """The first block of a walk in batches of two rows."""
    with contextlib.closing(Walk(Decoder.of(tiny), rows, batch_size, observers=observers).steps()) as steps:
        yield next(steps)


def expected_weights(policy: str, rows: torch.Tensor, seen: Seen) -> torch.Tensor:
    """What every token weighs, from the definitions; float64 [rows, length]."""
    ones = torch.ones(rows.shape, dtype=torch.float64)
    dots, bos = rows == 7, torch.zeros_like(rows, dtype=torch.bool)
    bos[:, 0] = True
    if policy == "boost":
        return torch.where(bos, 16.0, torch.where(dots, 3.0, ones))
    if policy == "exclude":
        return torch.where(bos | dots, 0.0, ones)
    if policy == "attention":
        received = seen.received[0]
        least, most = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        return 0.005 + 0.995 * (received - least) / (most - least)
    if policy == "cap":
        energy = seen.inputs[0].square().sum(-1)
        # The mean is that of the batch of two rows.
        means = torch.cat([part.mean().expand(len(part)) for part in energy.split(2)])[:, None]
        return torch.where(bos | dots, (means / energy).clamp(max=1), ones)
    return ones


@pytest.mark.parametrize("policy", ["all", "boost", "attention", "cap", "exclude"])
def test_the_hessian_weighs_tokens_as_the_policy_says(policy: str, tiny: PreTrainedModel, rows: torch.Tensor) -> None:
    seen = Seen(tiny, rows)
    weights = expected_weights(policy, rows, seen).flatten()
    inputs = seen.inputs[0].flatten(0, 1)
    expected = (inputs * weights[:, None]).T @ inputs / weights.sum()
    with first_step(tiny, rows) as step:
        found = collect(step, {NAME: tiny.get_submodule(NAME)}, TokenWeights(rows, settings(policy, BOS, DOT)))[NAME]
    torch.testing.assert_close(found.mean(), expected, rtol=1e-4, atol=1e-7)
    assert found.cross() is None


def test_a_token_of_several_sinks_takes_the_largest_weight(rows: torch.Tensor) -> None:
    anywhere = WeighedSink(token_id=1, position=None, weight=5.0)
    first = WeighedSink(token_id=None, position=0, weight=2.0)
    weights = TokenWeights(rows, settings("boost", first, anywhere)).weights
    assert (weights[:, 0] == 5).all()
    assert weights[1, 3] == 5
    assert (weights[:, 5] == 1).all()


def test_the_cross_moment_compares_with_the_unquantized_inputs(tiny: PreTrainedModel, rows: torch.Tensor) -> None:
    linear, norm = tiny.get_submodule(NAME), tiny.get_submodule("model.layers.0.input_layernorm")
    with first_step(tiny, rows) as step:
        hidden = step.walk.hidden
        ideal = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        found = collect(step, {NAME: linear}, TokenWeights(rows, settings("boost", BOS)), ideal)[NAME]
        one, other = (norm(states).double().flatten(0, 1) for states in (hidden, ideal))
    weights = torch.ones(rows.shape, dtype=torch.float64)
    weights[:, 0] = 16
    expected = ((other - one) * weights.flatten()[:, None]).T @ one / weights.sum()
    cross = found.cross()
    assert cross is not None
    torch.testing.assert_close(cross, expected, rtol=1e-4, atol=1e-6)


def test_places_of_sinks_are_counted_from_behind_what_stands_in_front() -> None:
    rows = torch.tensor([[5, 9, 1, 10, 11], [5, 9, 1, 12, 1]])
    first = WeighedSink(token_id=1, position=0, weight=16)
    assert TokenWeights(rows, settings("boost", first), 2).weights.tolist() == [[1, 1, 16, 1, 1]] * 2
    assert TokenWeights(rows, settings("exclude", first), 2).weights.tolist() == [[0, 0, 0, 1, 1]] * 2
    assert TokenWeights(rows, settings("cap", first), 2).sinks.tolist() == [[True, True, True, False, False]] * 2
    assert TokenWeights(rows, settings("exclude", first)).weights.tolist() == [[1, 1, 1, 1, 1]] * 2
