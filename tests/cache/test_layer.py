"""One layer on its own: every block is quantized once, exact tokens stay bit by bit, rows are bounded."""

from __future__ import annotations

import copy

import pytest
import torch

from sinkquant.artifacts import KVCachePlan, KVLayer
from sinkquant.artifacts.kv import layer_bytes
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.transforms.descent import Descent
from sinkquant.cache.transforms.recoding import LayerBases
from sinkquant.cache.transforms.rotation import Basis
from sinkquant.errors import RequestError

HEADS, KEY, VALUE = 3, 16, 32


def _plan(key_bits: list[int], value_bits: list[int], **settings: object) -> KVCachePlan:
    layer = KVLayer(packed=True, key_bits=key_bits, value_bits=value_bits, key_dim=KEY, value_dim=VALUE, reason="")
    given = {"group_size": 32, "window": 16, "symmetric": False, "rotate": False, "exact": "first-n", "max_exact": 3}
    return KVCachePlan.model_validate({
        "key_bits": key_bits[0], "value_bits": value_bits[0], "layers": [layer], "bits_per_value": 0, "length": 1,
        "expected_exact": 0, "bytes": 0, "unquantized_bytes": 0, "reason": ""} | given | settings)


def _states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, HEADS, tokens, KEY, generator=generator),
            torch.randn(batch, HEADS, tokens, VALUE, generator=generator))


def _filled(plan: KVCachePlan, tokens: int = 100, chunk: int = 100,
            flagged: tuple[tuple[int, int], ...] = ()) -> tuple[SinkLayer, torch.Tensor, torch.Tensor]:
    layer = SinkLayer(plan, 0)
    keys, values = _states(tokens)
    flags = torch.zeros(2, tokens, dtype=torch.bool)
    for row, column in flagged:
        flags[row, column] = True
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        layer.append(keys[:, :, start:stop], values[:, :, start:stop])
        layer.peel(flags[:, start:stop])
        layer.settle()
    return layer, keys, values


def _bytes(layer: SinkLayer) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors().values())


@pytest.mark.parametrize("settings", [
    {}, {"symmetric": True}, {"scale_tokens": True, "clip": "both"}, {"scale_bits": 8},
    {"scale_bits": 8, "symmetric": True}], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 47, 48, 100])
def test_bytes_are_as_accounted(tokens: int, bits: int, settings: dict[str, object]) -> None:
    plan = _plan([bits] * 3, [bits] * 3, **settings)
    layer, _, _ = _filled(plan, tokens, flagged=((0, 0), (1, 0), (1, min(40, tokens - 1))))
    assert _bytes(layer) == layer_bytes(plan, 0, tokens, layer.exact_columns.shape[1], rows=2, value_bytes=4)


def test_heads_have_bits_of_their_own() -> None:
    plan = _plan([2, 16, 4], [8, 2, 16])
    layer, keys, values = _filled(plan)
    found_keys, found_values = layer.dense()
    assert torch.equal(found_keys[:, 1], keys[:, 1])
    assert torch.equal(found_values[:, 2], values[:, 2])
    error = (found_keys - keys)[:, :, :64].abs().mean((0, 2, 3))
    assert error[0] > 3 * error[2] > 0
    assert _bytes(layer) == layer_bytes(plan, 0, 100, 0, rows=2, value_bytes=4)


@pytest.mark.parametrize("settings", [{}, {"rotate": True, "scale_tokens": True, "clip": "both", "scale_bits": 8}],
                         ids=str)
def test_blocks_are_quantized_once(settings: dict[str, object]) -> None:
    """Whatever arrives in which pieces, and however often it is read: old blocks never change again."""
    plan = _plan([2] * 3, [3, 16, 2], **settings)
    layer, _, _ = _filled(plan, 100)
    before = {name: tensor.clone() for name, tensor in layer.packed_keys.tensors().items()}
    for step in range(80):
        layer.append(*_states(1, seed=step + 1))
        layer.dense()
        layer.settle()
    for name, tensor in before.items():
        assert torch.equal(layer.packed_keys.tensors()[name][:, :, : tensor.shape[2]], tensor)
    pieces, _, _ = _filled(plan, 100, chunk=7)
    for name, tensor in pieces.packed_keys.tensors().items():
        assert torch.equal(tensor, before[name])


def test_exact_tokens_are_bit_identical_and_out_of_the_ranges() -> None:
    plan = _plan([2] * 3, [2] * 3)
    spots = ((0, 0), (1, 14), (1, 63))
    layer, keys, values = _filled(plan, flagged=spots)
    found_keys, found_values = layer.dense()
    for row, column in spots:
        assert torch.equal(found_keys[row, :, column], keys[row, :, column])
        assert torch.equal(found_values[row, :, column], values[row, :, column])
    assert not torch.equal(found_keys[0, :, 14], keys[0, :, 14])
    loud, loud_keys, loud_values = SinkLayer(plan, 0), keys.clone(), values.clone()
    loud_keys[0, :, 0], loud_values[0, :, 0] = 1e3, -1e3
    loud.append(loud_keys, loud_values)
    flags = torch.zeros(2, 100, dtype=torch.bool)
    for row, column in spots:
        flags[row, column] = True
    loud.peel(flags)
    loud.settle()
    assert torch.equal(loud.dense()[0][0, :, 1:], found_keys[0, :, 1:])
    assert torch.equal(loud.dense()[1][0, :, 1:], found_values[0, :, 1:])


def test_exact_tokens_are_bounded_and_late_ones_kept() -> None:
    plan = _plan([2] * 3, [2] * 3, max_exact=3)
    layer, keys, _ = _filled(plan, 100, chunk=10, flagged=((0, 5), (0, 95), (1, 1), (1, 2), (1, 50), (1, 51)))
    assert layer.exact_columns.tolist() == [[5, 95, -1], [1, 2, 50]]
    assert torch.equal(layer.exact_keys[0, :, 1], keys[0, :, 95])


@pytest.mark.parametrize("remove", [1, 20, 36, 37, 60, 68, 99, 100, 150])
def test_crop_equals_never_having_seen_the_rest(remove: int) -> None:
    plan = _plan([2] * 3, [2] * 3)
    layer, _, _ = _filled(plan, flagged=((0, 0), (0, 40), (1, 70)))
    full_keys, full_values = layer.dense()
    layer.crop(-remove)
    left = max(0, 100 - remove)
    assert layer.get_seq_length() == left
    found_keys, found_values = layer.dense()
    assert torch.equal(found_keys, full_keys[:, :, :left])
    assert torch.equal(found_values, full_values[:, :, :left])
    assert int(layer.exact_columns.max()) < left if layer.exact_columns.numel() else True
    more = _states(90, seed=9)
    layer.append(*more)
    layer.peel(torch.ones(2, 90, dtype=torch.bool))
    layer.settle()
    again = layer.dense()[0]
    assert again.shape[2] == left + 90
    packed = min(left, 64)  # what stood in the window by then is packed now
    assert torch.equal(again[:, :, :packed], full_keys[:, :, :packed])
    assert torch.equal(again[:, :, left], more[0][:, :, 0]) or plan.max_exact == int(
        (layer.exact_columns[0] < left).sum())
    assert torch.equal(again[:, :, -16:], more[0][:, :, -16:])


def test_crop_brings_nothing_back_that_a_sliding_window_has_dropped() -> None:
    plan = _plan([16] * 3, [16] * 3, window=0)
    plan.layers[0] = plan.layers[0].model_copy(update={"sliding_window": 48})
    layer, keys, _ = _filled(plan, 150)
    assert layer.dropped == 96  # of 102 that the next token does not see
    for removed in (40, 54):
        with pytest.raises(RequestError, match="activate_past_recording"):
            layer.crop(-removed)
    layer.crop(-3)
    assert layer.get_seq_length() == 147
    recorded = SinkLayer(plan, 0)
    recorded.activate_past_recording()
    recorded.append(*_states(150))
    recorded.settle()
    recorded.crop(-40)
    assert torch.equal(recorded.dense()[0][:, :, -47:], keys[:, :, 63:110])


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    plan = _plan([2, 4, 2], [2] * 3)
    layer, _, _ = _filled(plan, flagged=((0, 0), (1, 40)))
    keys, values = layer.dense()
    twin = copy.deepcopy(layer)
    twin.batch_repeat_interleave(2)
    twin.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(twin.dense()[0], keys[[1, 0, 0, 1]])
    twin.batch_select_indices(torch.tensor([0]))
    assert torch.equal(twin.dense()[1], values[[1]])
    twin = copy.deepcopy(layer)
    twin.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(twin.dense()[0], keys[[1]])
    assert torch.equal(layer.dense()[0], keys)


def test_matrices_are_moved_to_a_device_once() -> None:
    plan = _plan([2] * 3, [2] * 3, rotate="covariance", rotate_values="none", rounding="descent")
    bases = LayerBases(Basis.of_matrix(torch.eye(KEY).repeat(3, 1, 1)), None, Descent(torch.eye(KEY).repeat(3, 1, 1)))
    layers = [SinkLayer(plan, 0), SinkLayer(plan, 0)]
    for layer in layers:
        layer.take_bases(bases)
        layer.append(*(states.to("meta") for states in _states(3)))
        layer.take_bases(bases)
    one, two = (layer.packed_keys.recoding for layer in layers)
    assert isinstance(one.rotation, Basis)
    assert one.rotation.matrix.is_meta
    assert one.descent is not None
    assert one.descent.moment.is_meta
    assert one == two


def test_wrong_use_is_refused() -> None:
    plan = _plan([2] * 3, [2] * 3)
    layer, _, _ = _filled(plan)
    with pytest.raises(RequestError, match="holds 2 rows and was given 5"):
        layer.append(*_states(1, batch=5))
    with pytest.raises(ValueError, match="negative"):
        layer.crop(4)
    with pytest.raises(RequestError, match="in the model; make a plan"):
        SinkLayer(plan, 0).append(torch.zeros(1, 2, 1, KEY), torch.zeros(1, 2, 1, VALUE))
    layer.reset()
    layer.append(*_states(3, batch=5))
    assert layer.get_seq_length() == 3
