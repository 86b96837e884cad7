"""Rows or columns that stand in another order, and heads whose rotary embedding is some positions off."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from sinkquant.explain.patterns.finding import Evidence, Finding

ALIKE, CLEARLY = 0.9, 0.2
"""Cosine from which on two rows are the same one rounded, and by how much more than with its own place."""
PIECE = 1024
FARTHEST, NEAR = 8, 0.1
"""Positions that a head may be off, and radians that a pair may be from the angle of that many."""


def moved(evidence: Evidence) -> Iterator[Finding]:
    """Rows or columns that belong elsewhere."""
    for what, before, after, turned in (("rows", evidence.before, evidence.after, False),
                                        ("columns", evidence.before.T, evidence.after.T, True)):
        source = _sources(before, after)
        places = torch.nonzero(source != torch.arange(len(source), device=source.device)).flatten()
        if len(places) < 2:
            continue
        mended = after.clone()
        mended[source[places]] = after[places]
        shown = ", ".join(map(str, places[:6].tolist())) + (", ..." if len(places) > 6 else "")
        yield Finding("order", f"{len(places)} of {len(source)} {what} stand in another order ({shown})",
                      "giving them their places", mended.T if turned else mended)


def _sources(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """For every row of `after` the row of `before` that it is; its own place where that is not clear."""
    one, two = (torch.nn.functional.normalize(x.float(), dim=1) for x in (before, after))
    own = (one * two).sum(1)
    places = torch.arange(len(one), device=one.device)
    # No cosine is clearly more than that of a row that is near its own place.
    for run in (own <= 1 - CLEARLY).nonzero().flatten().split(PIECE):
        best, found = (two[run] @ one.T).max(1)
        places[run] = torch.where((best >= ALIKE) & (best >= own[run] + CLEARLY), found, places[run])
    return places


def rotated(evidence: Evidence) -> Iterator[Finding]:
    """Heads whose pairs are turned by the angles of one position or some."""
    width, half = evidence.heads, evidence.heads // 2
    if not width or len(evidence.frequencies) != half or len(evidence.before) % width:
        return
    one, two = (x.reshape(-1, 2, half, x.shape[1]).float() for x in (evidence.before, evidence.after))
    along = (one * two).sum((1, 3))
    across = (one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]).sum(-1)
    angles = torch.atan2(across, along)
    mended, off = two.clone(), {}
    for head in range(len(one)):
        for steps in sorted(set(range(-FARTHEST, FARTHEST + 1)) - {0}, key=abs):
            turned = evidence.frequencies.to(angles) * steps
            if float(_wrapped(angles[head] - turned).abs().max()) < NEAR and float(_wrapped(turned).abs().max()) > (
                    2 * NEAR):
                cos, sin = turned.cos()[:, None], turned.sin()[:, None]
                mended[head, 0] = cos * two[head, 0] + sin * two[head, 1]
                mended[head, 1] = cos * two[head, 1] - sin * two[head, 0]
                off[head] = steps
                break
    if off:
        said = ", ".join(f"head {head} by {steps:+d}" for head, steps in list(off.items())[:6])
        yield Finding("rope", f"the rotary positions of heads are off ({said})", "turning them back",
                      mended.reshape(evidence.after.shape).to(evidence.after.dtype))


def _wrapped(angles: torch.Tensor) -> torch.Tensor:
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
