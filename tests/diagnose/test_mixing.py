"""Rank, mixing products and Jacobians against closed forms and float64 references."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from sinkquant.artifacts import SinkToken
from sinkquant.diagnose import squashing
from sinkquant.diagnose.null import HALVES, halves, measured, self_distance
from sinkquant.diagnose.rows import mark_sinks
from sinkquant.diagnose.squashing import jacobian_norms, mixing_product, over_squashing, representational_collapse
from sinkquant.diagnose.survey import WalkSettings, effective_rank, rank_collapse, survey
from sinkquant.errors import RequestError
from sinkquant.models import Decoder

COMPUTE = WalkSettings()


def rows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    table = torch.randint(8, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    table[:, 0] = 1
    return table


def first_only(table: torch.Tensor) -> torch.Tensor:
    marked = torch.zeros_like(table, dtype=torch.bool)
    marked[:, 0] = True
    return marked


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.floats(0, 3))
def test_rank_collapse_is_the_distance_from_the_mean_row(length: int, width: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(length * 7 + width)
    hidden = torch.randn(length, width, generator=generator, dtype=torch.float64) + offset
    ones = torch.ones(length, 1, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(hidden - ones @ ones.T @ hidden / length)
    mu, ratio = rank_collapse(hidden)
    assert mu == pytest.approx(float(expected), abs=1e-12)
    assert ratio == pytest.approx(float(expected / torch.linalg.matrix_norm(hidden)), rel=1e-9)


def test_collapsed_states_have_no_mu_and_rank_one() -> None:
    hidden = torch.randn(1, 16).expand(9, 16)
    assert rank_collapse(hidden)[0] == pytest.approx(0, abs=1e-6)
    assert effective_rank(hidden) == pytest.approx(1)
    assert effective_rank(3 * torch.eye(7, 16)) == pytest.approx(7)


def uniform(layers: int) -> PreTrainedModel:
    """Queries of zero: attention is even over what a query sees."""
    model = tiny_model("llama", num_hidden_layers=layers)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data.zero_()
    return model


def test_the_mixing_product_of_even_attention_is_known() -> None:
    length, layers, heads = 12, 3, 4
    even = torch.tril(torch.ones(length, length, dtype=torch.float64))
    even /= even.sum(-1, keepdim=True)
    abar = (heads * even + torch.eye(length, dtype=torch.float64) / heads) / (heads + 1 / heads)
    found = mixing_product(Decoder.of(uniform(layers)), rows(3, length), COMPUTE)
    assert found.shape == (3, length, length)
    torch.testing.assert_close(found, torch.linalg.matrix_power(abar, layers).expand_as(found), rtol=1e-5, atol=1e-7)


def test_even_attention_has_rows_of_full_entropy_and_equal_mass() -> None:
    table = rows(4, 16)
    found = survey(Decoder.of(uniform(2)), table, first_only(table), COMPUTE)
    for layer in range(2):
        torch.testing.assert_close(found.table.entropy[layer], torch.ones(4, 4, dtype=torch.float64))
    expected = (1 / torch.arange(2, 17).double()).mean()
    torch.testing.assert_close(torch.stack(found.head_mass()), expected.expand(2, 4, 4), rtol=1e-5, atol=1e-7)


def test_long_rows_are_refused_for_exact_products() -> None:
    with pytest.raises(RequestError, match="at most 256 tokens"):
        mixing_product(Decoder.of(uniform(1)), rows(1, 257), COMPUTE)


def test_jacobians_are_those_of_a_float64_reference() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data *= 3  # far from the identity
    row = rows(1, 5)[0]
    found = jacobian_norms(Decoder.of(model), row)
    twin = tiny_model("llama", num_hidden_layers=2, dtype=torch.float64)
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    place = torch.arange(5)[None]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        angles = twin.model.rotary_emb(hidden, place)
        for block in twin.model.layers:
            hidden = block(hidden, attention_mask=None, position_ids=place, position_embeddings=angles)
        return hidden[0, -1]

    jacobian = torch.autograd.functional.jacobian(forward, twin.model.embed_tokens(row[None]).detach())
    expected = torch.linalg.matrix_norm(jacobian[:, 0].transpose(0, 1), ord=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_attention_nothing_reaches_the_last_token() -> None:
    model = tiny_model("gpt_neox")
    for block in model.gpt_neox.layers:
        for linear in (block.attention.dense, block.mlp.dense_4h_to_h):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    found = jacobian_norms(Decoder.of(model), rows(1, 6)[0])
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.float64))
    collapse = representational_collapse(Decoder.of(model), rows(3, 17), COMPUTE)
    assert [one.length for one in collapse] == [8, 16]
    assert all(one.distance.value == 0 for one in collapse)


def test_large_models_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.of(tiny_model("llama", num_hidden_layers=1))
    table = rows(2, 20)
    full = over_squashing(decoder, table, first_only(table), COMPUTE)
    assert full.jacobian is not None
    assert len(full.jacobian) == len(full.product) == 20
    assert sum(full.product) == pytest.approx(1)
    monkeypatch.setattr(squashing, "JACOBIAN_PARAMETERS", 10)
    assert over_squashing(decoder, table, first_only(table), COMPUTE).jacobian is None
    with pytest.raises(RequestError, match="exact Jacobians"):
        jacobian_norms(decoder, table[0])


def test_the_null_comes_from_random_halves() -> None:
    first, second = halves(9, seed=3)
    assert first.shape == second.shape == (HALVES, 4)
    assert all(not set(a) & set(b) for a, b in zip(first.tolist(), second.tolist(), strict=True))
    assert torch.equal(first, halves(9, seed=3)[0])
    figure = measured(torch.arange(40.0), seed=0)
    assert figure.value == 19.5
    assert 10 < figure.low < 19.5 < figure.high < 29
    constant = measured(torch.full((5,), 2.0), seed=0)
    assert constant.value == constant.low == constant.high == 2
    values = torch.tensor([0.0, 10.0])
    assert self_distance(2, 0, lambda a, b: abs(float(values[a].mean() - values[b].mean()))) == 10


def test_sinks_are_marked_where_the_map_says() -> None:
    table = torch.tensor([[1, 9, 4, 1], [1, 4, 8, 8]])

    def sink(token_id: int | None, position: int | None, kind: str = "token") -> SinkToken:
        return SinkToken(token_id=token_id, text=None, position=position, kind=kind, attention=0.5, heads=0.5,
                         share=0.1, massive=False)

    assert mark_sinks(table, [sink(4, None)]).tolist() == [[False, False, True, False], [False, True, False, False]]
    assert mark_sinks(table, [sink(1, 0)]).tolist() == [[True, False, False, False]] * 2
    # A model without sinks, or with a learned one only, is looked at through its first position.
    assert mark_sinks(table, [sink(None, None, "learned")]).tolist() == [[True, False, False, False]] * 2
