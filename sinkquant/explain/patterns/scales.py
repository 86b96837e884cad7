"""Scales that are wrong while the codes are right, and scales that one outlier set."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.explain.patterns.finding import Evidence, Finding

GROUPS = (0, 128, 64, 32, 16)
"""Weights that share a scale; 0: a whole row."""
LEFT = 0.3
"""Share of the squared error that may be left when scales alone are put right."""
OFF = 0.1
"""A scale is wrong from this relative error on."""
DOMINATED, FEW = 0.5, 0.1
"""Share of a group's squares that its largest weight holds, and share of groups that may be like that."""


def wrong_scales(evidence: Evidence) -> Iterator[Finding]:
    """The coarsest groups whose scales explain the error: every group points where it did, and is too long or short."""
    before, after = evidence.before.float(), evidence.after.float()
    error = (after - before).square().sum()
    for size in GROUPS:
        if size and (before.shape[1] % size or size >= before.shape[1]):
            continue
        one, two = (_grouped(x, size) for x in (before, after))
        factor = (one * two).sum(-1, keepdim=True) / one.square().sum(-1, keepdim=True).clamp(min=1e-30)
        usable = factor.abs() > 1e-3
        mended = torch.where(usable, two / torch.where(usable, factor, 1.0), two)
        wrong = usable & ((factor - 1).abs() > OFF)
        count = int(wrong.sum())
        if not count or (mended - one).square().sum() > LEFT * error:
            continue
        low, high = float(factor[wrong].min()), float(factor[wrong].max())
        what = "rows" if not size else f"groups of {size}"
        yield Finding("scales", f"{count} of {wrong.numel()} {what} have wrong scales ({low:.2g} to {high:.2g} times "
                      "the right ones), as where scales were exchanged or put in a wrong order",
                      "putting back the scales alone", mended.reshape(after.shape).to(evidence.after.dtype))
        return


def outlier_scales(evidence: Evidence) -> Iterator[Finding]:
    """Groups in which one weight set the scale, so that all others were rounded away."""
    for size in GROUPS:
        if size and (evidence.before.shape[1] % size or size >= evidence.before.shape[1]):
            continue
        one, two = (_grouped(x.float(), size) for x in (evidence.before, evidence.after))
        squares = one.square()
        largest = squares.amax(-1)
        dominated = largest > DOMINATED * squares.sum(-1)
        if not dominated.any() or float(dominated.float().mean()) > FEW:
            continue
        mended = torch.where(dominated[..., None], one, two).reshape(evidence.after.shape)
        what = "rows" if not size else f"groups of {size}"
        yield Finding("outlier scale", f"{int(dominated.sum())} {what} have a scale that one outlier set, and their "
                      "other weights were rounded away", "putting these back", mended.to(evidence.after.dtype))
        return


def _grouped(matrix: torch.Tensor, size: int) -> torch.Tensor:
    return matrix.reshape(len(matrix), -1, size or matrix.shape[1])
