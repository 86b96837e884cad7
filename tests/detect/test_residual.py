"""The residual stream against hidden states of a plain forward pass, and what counts as massive."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model

from sinkquant.detect import residual
from sinkquant.detect.massive import massive_channels
from sinkquant.detect.residual import TOP, ResidualStream
from sinkquant.models import Decoder, Walk
from sinkquant.recipe import Detection


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_divided_and_its_ends_are_the_hidden_states(family: str) -> None:
    model = tiny_model(family, initializer_range=0.2)
    rows = torch.randint(8, 128, (5, 40), generator=torch.Generator().manual_seed(1))
    stream = ResidualStream()
    for step in Walk(Decoder.of(model), rows, 2).steps():
        stream.run(step)
    assert stream.names == ["embedding", *(f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp"))]
    with torch.no_grad():
        states = model(rows, use_cache=False, output_hidden_states=True).hidden_states
    for boundary, state in zip((0, 2, 4), states[:-1], strict=True):
        assert torch.allclose(stream.maximum[boundary], state.abs().amax(dim=(0, 1)), rtol=1e-4, atol=1e-4)
        assert torch.allclose(stream.top_values[boundary], state.abs().topk(TOP).values, rtol=1e-4, atol=1e-4)
        assert stream.median[boundary] == pytest.approx(float(state.abs().median()), rel=0.1)


def watched(*states: torch.Tensor) -> ResidualStream:
    stream = ResidualStream()
    for index, state in enumerate(states):
        stream.add("embedding" if index == 0 else f"layers.{index - 1}", [state])
    return stream


def noise(seed: int) -> torch.Tensor:
    return torch.randn(4, 20, 32, generator=torch.Generator().manual_seed(seed))


ROWS = torch.arange(80).reshape(4, 20)


@pytest.mark.parametrize("length", [64, 100, 128])
def test_the_median_of_a_sample_is_near_that_of_all(length: int) -> None:
    states = torch.randn(40, length, 100, generator=torch.Generator().manual_seed(length))
    assert watched(states).median[0] == pytest.approx(float(states.abs().median()), rel=0.02)


def test_pieces_of_a_boundary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [noise(0), noise(1)]
    whole = watched(*states)
    monkeypatch.setattr(residual, "PIECE", 700)
    parts = watched(*states)
    assert parts.median == whole.median
    for name in ("maximum", "top_values", "top_channels"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(parts, name), getattr(whole, name), strict=True))


def test_birth_and_end_are_the_largest_rise_and_fall() -> None:
    states = [noise(i) for i in range(5)]
    for index, level in ((1, 40.0), (2, 300.0), (3, 310.0), (4, 1.0)):
        states[index][:, 3, 7] = -level
    (channel,) = massive_channels(watched(*states), ROWS, Detection())
    assert (channel.channel, channel.born, channel.ended) == (7, "layers.1", "layers.3")
    assert channel.peak == 310
    assert channel.ratio == pytest.approx(310 / float(states[3].abs().median()), rel=0.01)
    assert channel.carriers.nonzero().tolist() == [[row, 3] for row in range(4)]


def test_a_channel_that_many_tokens_carry_is_no_massive_activation() -> None:
    state = noise(0)
    state[:, ::3, 7] = 300
    assert massive_channels(watched(state), ROWS, Detection()) == []
    same = torch.where(torch.arange(20) % 3 == 0, torch.tensor(99), ROWS)
    (channel,) = massive_channels(watched(state), same, Detection())
    assert channel.channel == 7


def test_the_threshold_is_a_ratio_to_the_median() -> None:
    state = noise(0)
    median = float(state.abs().median())
    state[0, 0, 7], state[0, 0, 9] = 49 * median, 52 * median
    assert [c.channel for c in massive_channels(watched(state), ROWS, Detection())] == [9]
    assert [c.channel for c in massive_channels(watched(state * 1e-3), ROWS, Detection())] == [9]
