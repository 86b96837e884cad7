"""Which rows have to be read, where some begin others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sinkquant.evaluate.likelihood import _read_in


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=12))
def test_every_row_is_in_one_that_begins_with_it_and_none_is_read_twice(rows: list[list[int]]) -> None:
    inside = _read_in(rows)
    assert sorted(i for members in inside.values() for i in members) == list(range(len(rows)))
    for reader, members in inside.items():
        assert all(rows[reader][:len(rows[i])] == rows[i] for i in members)
        assert not any(rows[other][:len(rows[reader])] == rows[reader] for other in inside if other != reader)
