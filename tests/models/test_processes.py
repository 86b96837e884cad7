"""Work that processes share: each does its part, each gets the whole."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from sinkquant.models import processes


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 5), (3, 2), (2, 0)])
def test_every_process_does_its_share_and_gets_all(ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(processes, "_store", lambda: (store, here.rank, ranks))
    monkeypatch.setattr(processes, "this_process", lambda: (here.rank, ranks))
    found: dict[int, list[Any]] = {}
    worked: dict[int, list[int]] = {rank: [] for rank in range(ranks)}

    def process(rank: int) -> None:
        here.rank = rank

        def work(items: list[int]) -> list[float]:
            worked[rank] += items
            return [item / 3 for item in items]

        found[rank] = [processes.shared(range(count), work), processes.shared(range(count), work)]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(found[rank] == [[item / 3 for item in range(count)]] * 2 for rank in range(ranks))  # to the last bit
    assert sorted(item for items in worked.values() for item in items) == sorted(2 * list(range(count)))
    assert max(map(len, worked.values())) <= 2 * -(-count // ranks)


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    assert processes.this_process() == (0, 1)
