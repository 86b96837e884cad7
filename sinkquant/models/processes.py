"""Work that the processes of torchrun share without a process group, which other libraries would share theirs in.

What a process has done is handed over through the store that torchrun keeps for its processes, as JSON. A process that
torchrun did not start is alone, and nothing here does anything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=7)
"""How long a process waits for the others."""


def this_process() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1
    return _store()[1:]


def new_store() -> dist.Store:
    """A store for one process group. Every process gets that of the same group if all call this equally often."""
    store, rank, _ = _store()
    return dist.PrefixStore(f"sinkquant/group/{store.add(f'sinkquant/groups/{rank}', 1)}", store)


def shared(items: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """What `work` makes of every item, one result per item; every process does its share and gets all results.

    Args:
        work: takes some items and gives as many results, which JSON can hold; tuples come back as lists.
    """
    rank, ranks = this_process()
    if ranks == 1:
        return work(list(items))
    mine = list(items)[rank::ranks]
    parts = _gather(work(mine) if mine else [])
    return [parts[index % ranks][index // ranks] for index in range(len(items))]


def _gather(part: list[Any]) -> list[list[Any]]:
    """What every process has, in the order of the ranks, on each of them."""
    store, rank, ranks = _store()
    turn = store.add(f"sinkquant/turns/{rank}", 1)
    store.set(f"sinkquant/turn/{turn}/{rank}", json.dumps(part))
    return [json.loads(store.get(f"sinkquant/turn/{turn}/{other}")) for other in range(ranks)]


@functools.cache
def _store() -> tuple[dist.Store, int, int]:
    """torchrun's store, this process's rank, and the number of processes."""
    store, rank, ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
    return store, rank, ranks
