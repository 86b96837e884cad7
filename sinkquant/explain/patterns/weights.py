"""Single weights and whole columns that carry a matrix's part of the loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.explain.patterns.finding import Evidence, Finding

MOST = 0.5
"""Share of the matrix's part, to first order, from which on a few weights or columns are worth a try."""
SOME = (1, 4)


def single_weights(evidence: Evidence) -> Iterator[Finding]:
    """One weight, or four, that carry most of it: super weights (Yu et al. 2411.07191) that were clipped or rounded."""
    shares = evidence.shares.float().flatten()
    total = float(shares.sum())
    for count in SOME:
        if total <= 0 or count >= len(shares):
            return
        top = shares.topk(count)
        if float(top.values.sum()) < MOST * total:
            continue
        mended, before = evidence.after.clone(), evidence.before
        flat = mended.view(-1)
        flat[top.indices] = before.reshape(-1)[top.indices]
        columns = evidence.after.shape[1]
        said = ", ".join(f"[{place // columns}, {place % columns}] is {float(evidence.after.reshape(-1)[place]):.3g} "
                         f"instead of {float(before.reshape(-1)[place]):.3g}" for place in top.indices.tolist())
        yield Finding("super weight", f"the weight{'s' if count > 1 else ''} {said}",
                      f"putting back {'that one weight' if count == 1 else 'these weights'}", mended)
        return


def few_columns(evidence: Evidence) -> Iterator[Finding]:
    """Columns that were zeroed, or a few that carry most of it."""
    after, before = evidence.after, evidence.before
    zeroed = torch.nonzero((after == 0).all(0) & (before != 0).any(0)).flatten()
    if len(zeroed):
        yield _columns(evidence, zeroed, "is zero", "are zero")
        return
    shares = evidence.shares.float().sum(0)
    total = float(shares.sum())
    for count in SOME:
        if total <= 0 or count >= len(shares):
            return
        top = shares.topk(count)
        if float(top.values.sum()) >= MOST * total:
            yield _columns(evidence, top.indices, "carries most of what it loses", "carry most of what it loses")
            return


def _columns(evidence: Evidence, columns: torch.Tensor, one: str, several: str) -> Finding:
    mended = evidence.after.clone()
    mended[:, columns] = evidence.before[:, columns]
    names = ", ".join(map(str, columns[:6].tolist())) + (", ..." if len(columns) > 6 else "")
    of_sinks = sorted(set(columns.tolist()) & set(evidence.sink_columns))
    word = "column" if len(columns) == 1 else "columns"
    reads = ", which the sinks set," if of_sinks else ""
    return Finding("sink columns" if of_sinks else "columns",
                   f"{word} {names}{reads} {one if len(columns) == 1 else several}",
                   f"putting back {'that column' if len(columns) == 1 else 'these columns'}", mended)
