"""Codes of a key chosen together: never a worse score, the grid as it was, and what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan

from sinkquant.cache import Bases, SinkCache, find_bases, load_bases, prepare, save_bases
from sinkquant.cache.store import PackedStates
from sinkquant.cache.transforms.covariance import balancing, read_by
from sinkquant.cache.transforms.descent import Descent
from sinkquant.cache.transforms.recoding import LayerBases, Recoding
from sinkquant.cache.transforms.rotation import Basis
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk

HEADS, WIDTH = 3, 40
ROWS = torch.randint(8, 128, (4, 90), generator=torch.Generator().manual_seed(0))


def _spread(seed: int, tokens: int = 320) -> torch.Tensor:
    """float32 [2, HEADS, tokens, WIDTH] with a spectrum and directions of its own per head."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, generator=generator))[0]
    return torch.randn(2, HEADS, tokens, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH) @ turned


def _moment(states: torch.Tensor) -> torch.Tensor:
    flattened = states.double().transpose(0, 1).flatten(1, 2)
    return flattened.mT @ flattened


def _store(bits: int, scale_bits: int, recoding: Recoding, keys: torch.Tensor) -> PackedStates:
    store = PackedStates([bits] * HEADS, 32, None, False, recoding, scale_bits)  # type: ignore[arg-type]
    store.append(keys, None)
    return store


@pytest.mark.parametrize(("bits", "scale_bits"), [(2, 8), (3, 16)])
def test_scores_of_other_queries_err_less_on_the_same_grid(bits: int, scale_bits: int) -> None:
    keys, queries = _spread(0), _spread(1)
    matrix = balancing(_moment(keys[:1]), _moment(queries[:1]), 1 / 3)
    nearest = Recoding(Basis.of_matrix(matrix), clip=True)
    together = Recoding(nearest.rotation, clip=True, descent=Descent.of_moment(read_by(matrix, _moment(queries[:1]))))
    one, other = (_store(bits, scale_bits, recoding, keys) for recoding in (nearest, together))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]) == ("data" not in name)
    errors = [(queries[1:] @ (store.dense(torch.float32) - keys)[1:].mT).square().mean() for store in (one, other)]
    assert errors[1] < 0.8 * errors[0]


def test_a_code_is_changed_only_where_the_sum_of_squares_falls() -> None:
    """Every code of every key, one by one, in float64: no other one costs less."""
    states, readers = torch.randn(1, 2, 1, 8, 6, generator=torch.Generator().manual_seed(0)), _moment(
        torch.randn(1, 2, 20, 6, generator=torch.Generator().manual_seed(1)) @ torch.randn(6, 6))
    step, start = torch.full((1, 2, 1, 1, 6), 0.7), torch.full((1, 2, 1, 1, 6), -1.0)
    descent = Descent.of_moment(readers)
    codes = descent.codes(states, step, start, 3)

    def cost(some: torch.Tensor) -> torch.Tensor:
        errors = (states - start - step * some).double()
        return torch.einsum("bhngd,hde,bhnge->bhng", errors, descent.moment.double(), errors)

    nearest = ((states - start) / step).round().clamp(0, 3)
    assert (cost(codes) <= cost(nearest) + 1e-6).all()
    assert not torch.equal(codes.float(), nearest)
    assert int(codes.max()) <= 3


def test_no_direction_of_the_queries_leaves_the_nearest_codes() -> None:
    keys = _spread(0, 64)
    even = Descent.of_moment(torch.eye(WIDTH, dtype=torch.float64).expand(HEADS, -1, -1))
    basis = Basis.of_matrix(torch.eye(WIDTH).expand(HEADS, -1, -1))
    one, other = (_store(2, 8, Recoding(basis, descent=descent), keys) for descent in (None, even))
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_a_cache_packs_so_and_needs_the_moments(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plans = [kv_plan(model, 2, rotate="covariance", clip="both", rounding=rounding) for rounding in
             ("nearest", "descent")]
    found = [find_bases(Walk(Decoder.of(model), ROWS, 4), plan) for plan in plans]
    save_bases(found[1], tmp_path / "bases.safetensors")
    again = load_bases(tmp_path / "bases.safetensors")
    for index, layer in found[1].layers.items():
        assert layer.descent is not None
        assert torch.equal(layer.descent.moment, again.layers[index].descent.moment)  # type: ignore[union-attr]
    prepare(model, bases=again)
    cache = SinkCache(model.config, plans[1])
    with torch.no_grad():
        model(ROWS, past_key_values=cache)
    with_gradients = SinkCache(model.config, plans[1])
    model(ROWS, past_key_values=with_gradients)
    assert torch.equal(with_gradients.layers[0].dense()[0], cache.layers[0].dense()[0])
    assert cache.layers[0].packed_keys.recoding.descent is not None
    assert cache.layers[0].packed_values.recoding.descent is None
    without = Bases({index: LayerBases(layer.keys, layer.values) for index, layer in again.layers.items()}, again.model)
    other = tiny_model("llama")
    prepare(other, bases=without)
    with pytest.raises(RequestError, match="was not given"), torch.no_grad():
        other(ROWS, past_key_values=SinkCache(model.config, plans[1]))
