"""Rows of tokens that diagnostics run on: the text as it is, and what can be done to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sinkquant.artifacts import SinkToken
from sinkquant.sinks import SinkSelector


def mark_sinks(rows: torch.Tensor, sinks: Sequence[SinkToken]) -> torch.Tensor:
    """bool [rows, length]: where these rows hold a sink token; the first position where the model has none."""
    marked = SinkSelector.of(sinks).mask(rows)
    if not marked.any():
        marked[:, 0] = True
    return marked


def random_rows(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of the same shape whose tokens are drawn evenly from those of `rows`; the first position is kept."""
    ids = rows[:, 1:].unique()
    drawn = ids[torch.randint(len(ids), rows.shape, generator=torch.Generator().manual_seed(seed))]
    drawn[:, 0] = rows[:, 0]
    return drawn


def repeated_rows(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """As many rows, each of one token of `rows` repeated from the first position on, without any `<bos>`."""
    ids = rows[:, 1:].unique()
    picked = ids[torch.randint(len(ids), (len(rows),), generator=torch.Generator().manual_seed(seed))]
    return picked[:, None].expand(-1, rows.shape[1]).clone()


def swapped(rows: torch.Tensor, position: int, seed: int) -> torch.Tensor:
    """The rows with the token at `position` replaced by another one of the text's, drawn evenly."""
    ids = rows[:, 1:].unique()
    if len(ids) < 2:
        return rows.clone()
    generator = torch.Generator().manual_seed(seed)
    place = torch.searchsorted(ids, rows[:, position].contiguous())
    step = torch.randint(1, len(ids), (len(rows),), generator=generator)
    changed = rows.clone()
    changed[:, position] = ids[(place + step) % len(ids)]
    return changed


def with_bos(text: torch.Tensor, bos: int, places: Sequence[int]) -> torch.Tensor:
    """Rows of text without `<bos>` with one put in before each of the given positions of the text, in order."""
    parts, start = [], 0
    column = torch.full((len(text), 1), bos, dtype=torch.long)
    for place in places:
        parts += [text[:, start:place], column]
        start = place
    return torch.cat([*parts, text[:, start:]], dim=1)
