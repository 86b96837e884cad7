"""Where sinks stand, against the rule written token by token; padding and learned columns are never one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkquant.artifacts import KVSink, MassiveCarriers, SinkToken, WeighedSink
from sinkquant.sinks import SinkSelector

ROWS = torch.tensor([[7, 5, 4, 6], [1, 4, 5, 4]])


def token(token_id: int | None, position: int | None) -> SinkToken:
    kind: Any = "learned" if token_id is None and position is None else "token"
    return SinkToken(token_id=token_id, text=None, position=position, kind=kind, attention=0.5, heads=0.5, share=0.1,
                     massive=False)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 4), length=st.integers(2, 9), data=st.data())
def test_ids_and_positions(count: int, length: int, data: Any) -> None:
    rows = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length),
                                           min_size=count, max_size=count)))
    padding = data.draw(st.lists(st.integers(0, length - 1), min_size=count, max_size=count))
    places = torch.stack([torch.arange(length) - gap for gap in padding])
    sinks = [token(*pair) for pair in data.draw(st.lists(st.tuples(
        st.none() | st.integers(0, 3), st.none() | st.integers(0, 10))))]

    def is_sink(row: int, column: int) -> bool:
        return places[row, column] >= 0 and any(
            (s.token_id, s.position) != (None, None) and s.token_id in (None, rows[row, column])
            and s.position in (None, places[row, column]) for s in sinks)

    expected = [[is_sink(row, column) for column in range(length)] for row in range(count)]
    assert SinkSelector.of(sinks).mask(rows, places).tolist() == expected
    if not any(padding):
        assert SinkSelector.of(sinks).mask(rows).tolist() == expected


def test_all_records_of_a_sink_say_the_same() -> None:
    records = (token(4, None), KVSink(token_id=4, position=None), WeighedSink(token_id=4, position=None, weight=3.0))
    masks = [SinkSelector.of([record]).mask(ROWS) for record in records]
    assert masks[0].tolist() == [[False, False, True, False], [False, True, False, True]]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_positions_alone_need_no_ids() -> None:
    places = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])
    assert SinkSelector.of([token(None, 0)]).mask(positions=places).tolist() == [
        [False, False, True, False], [True, False, False, False]]
    with pytest.raises(ValueError, match="no token ids"):
        SinkSelector.of([token(4, 0)]).mask(positions=places)


def test_carriers_show_themselves_in_hidden_states() -> None:
    carriers = MassiveCarriers(layer=1, channels=[2, 5], thresholds=[10.0, 20.0])
    hidden = torch.zeros(2, 4, 8)
    hidden[0, 1, 2], hidden[0, 2, 5], hidden[1, 3, 5], hidden[1, 0, 7] = -11.0, 19.0, 21.0, 99.0
    expected = [[False, True, False, False], [False, False, False, True]]
    assert SinkSelector(carriers=carriers).mask(hidden=hidden).tolist() == expected
    both = SinkSelector.of([token(7, None)], carriers)
    assert both.mask(ROWS, hidden=hidden).tolist() == [[True, True, False, False], [False, False, False, True]]
    assert both.mask(ROWS).tolist() == [[True, False, False, False], [False] * 4]
