"""What tuning end to end takes, in memory and time."""

from __future__ import annotations

from sinkquant.costs import KEPT_BY_ALLOCATOR, Pace, Sizes
from sinkquant.quantize.refine.distill import LOGITS_BYTES
from sinkquant.quantize.refine.refine import ROWS


def distill_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    settings, tuned = sizes.recipe.calibration, sum(x.parameters for block in sizes.linears for x in block)
    rows = max(1, min(ROWS, LOGITS_BYTES // (4 * sizes.vocabulary * settings.length)))
    tokens = rows * settings.length
    # Dense weights, and of every tuned one its gradient, how far its code has moved, and what it started from.
    weights = sizes.total * sizes.item + tuned * (sizes.item + 4 + 3) + 24 * sizes.largest
    states = settings.rows * settings.length * sizes.hidden * sizes.item
    blocks = len(sizes.linears) * tokens * (6 * sizes.widest + 12 * sizes.hidden) * sizes.item
    return KEPT_BY_ALLOCATOR * (weights + states + blocks + 7 * 4.0 * tokens * sizes.vocabulary)


def distill_seconds(sizes: Sizes, pace: Pace) -> float:
    """Seconds of all steps, and of the unquantized model's answers before them."""
    settings = sizes.recipe.calibration
    tokens, tuned = settings.rows * settings.length, sizes.recipe.weights.distill * ROWS * settings.length
    head = 2.0 * sizes.vocabulary * sizes.hidden
    return ((3 * tuned + 2 * tokens) * len(sizes.linears) * pace.plain
            + (3 * tuned + 4 * tokens) * head * pace.operation)
