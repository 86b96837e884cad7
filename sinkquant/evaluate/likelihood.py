"""Log-likelihoods of continuations: logits are taken of the scored positions alone, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sinkquant.models.head import OutputHead, runs_of_positions

TOKENS_AT_ONCE = 4096
"""Tokens of a batch at most, or one row: attention and MLP of more take memory and no time off."""


def continuation_scores(states: Callable[[torch.Tensor], torch.Tensor], head: OutputHead,
                        pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[tuple[float, bool]]:
    """Sum of log-probabilities in nats, and whether each token is the likeliest, for every continuation.

    A row that another begins with is read in that one: answers of one token to the same question are one row.

    Args:
        states: int64 [rows, length], padded with zeros on the right -> what the head is given.
        pairs: (context, continuation) in token ids, neither of them empty.
        batch_size: rows at a time.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    rows = [(context + target)[:-1] for context, target in pairs]
    inside = _read_in(rows)
    # The longest first, so that a batch holds rows of one length or so; equal rows give equal batches in any order.
    order = sorted(inside, key=lambda i: (-len(rows[i]), rows[i]))
    while order:
        size = max(1, min(batch_size, TOKENS_AT_ONCE // len(rows[order[0]])))
        batch, order = order[:size], order[size:]
        asked = [(place, i) for place, row in enumerate(batch) for i in inside[row]]
        ends = [(place, len(rows[i])) for place, i in asked]
        for (_, i), score in zip(asked, _scores(states, head, [rows[i] for i in batch], ends,
                                                [pairs[i][1] for _, i in asked]), strict=True):
            found[i] = score
    return found


def _read_in(rows: list[list[int]]) -> dict[int, list[int]]:
    """Rows that have to be read -> those that each begins with, itself among them; every row is in one of them."""
    found: dict[int, list[int]] = {}
    last = None
    # In the order of their tokens, a row comes right before those that begin with it.
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if last is None or rows[last][:len(rows[i])] != rows[i]:
            last = i
        found.setdefault(last, []).append(i)
    return found


def _scores(states: Callable[[torch.Tensor], torch.Tensor], head: OutputHead, rows: list[list[int]],
            ends: list[tuple[int, int]], targets: list[list[int]]) -> list[tuple[float, bool]]:
    """Scores of targets, whose last tokens are predicted right before the `ends`: (row, position)."""
    ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, :len(row)] = torch.tensor(row)
    given = states(ids)
    picked = torch.cat([given[place, end - len(target):end]
                        for (place, end), target in zip(ends, targets, strict=True)])
    wanted = torch.tensor([token for target in targets for token in target], device=picked.device)
    scores, greedy = torch.empty(len(wanted), dtype=torch.float64), torch.empty(len(wanted), dtype=torch.bool)
    for run in runs_of_positions(head.vocabulary, len(wanted)):
        likely = torch.log_softmax(head.logits(picked[run]), dim=-1)
        here = wanted[run].to(likely.device)
        scores[run] = likely.gather(-1, here[:, None])[:, 0].double().cpu()
        greedy[run] = (likely.argmax(-1) == here).cpu()
    lengths = [len(target) for target in targets]
    return [(float(score.sum()), bool(same.all()))
            for score, same in zip(scores.split(lengths), greedy.split(lengths), strict=True)]
