"""What detection takes, in memory and time.

What depends on what it finds is counted as a trained model usually has it: `CANDIDATES` modules whose large weights are
zeroed to see whether they are super weights.
"""

from __future__ import annotations

from sinkquant.costs import PIECES, Pace, Sizes
from sinkquant.detect.detect import REPEATED_ROWS
from sinkquant.detect.residual import TOP
from sinkquant.detect.roles import TOKENS as ROLE_TOKENS
from sinkquant.detect.super_weights import ABLATION_ROWS, NULL_WEIGHTS, PER_MODULE, SCREENED_ROWS
from sinkquant.detect.survey import batch_rows

CANDIDATES = 3
BLOCKS_AFTER = 2 / 3
"""The share of the blocks that follow a candidate: they stand where massive activations are born, in the first blocks,
or end, in the last."""


def detect_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    settings = sizes.recipe.detect
    sets = _detected_tokens(sizes)
    batch = max(batch_rows(sizes.decoder, sizes.recipe, length) * length
                for length in (settings.length, min(settings.long_length, sizes.decoder.max_length)))
    # With experts on disk: what they are handed and what they answer, and what the recorder keeps.
    apart = 2 * sum(sets) + max(sets) if sizes.expert else 0
    buffers = (sum(sets) + max(sets) + apart) * sizes.hidden * sizes.item
    watched = batch * (sizes.widest + 3 * sizes.hidden) * 4 + PIECES
    tables = sum(sets) * (4 * sizes.heads + 2 * 12 * TOP) * len(sizes.linears)
    running = (sizes.held + sizes.expert) * sizes.item + watched + sizes.activations(batch, settings.length)
    return max(sizes.walked(sizes.held, sizes.expert), running) + buffers + tables


def detect_seconds(sizes: Sizes, pace: Pace, super_weights: bool, bos: bool) -> float:
    """Seconds; `super_weights`: whether they are looked for; `bos`: whether rows start with `<bos>`, so that they are
    read without it as well."""
    blocks, reading, loss = len(sizes.linears), pace.reading(sizes), pace.loss(sizes)
    settings, (short, long) = sizes.recipe.detect, pace.watched
    block = (1 + bos) * short.of(settings.rows * settings.length) + short.of(REPEATED_ROWS * settings.length)
    if settings.long_rows:
        block += long.of(settings.long_rows * min(settings.long_length, sizes.decoder.max_length))
    seconds = blocks * block + 2 * reading + blocks * ROLE_TOKENS * pace.plain  # roles are read in a walk of their own
    if super_weights:
        for rows, trials in ((SCREENED_ROWS, PER_MODULE + NULL_WEIGHTS), (ABLATION_ROWS, PER_MODULE)):
            tokens, tried = min(rows, settings.rows) * settings.length, CANDIDATES * trials
            replays = blocks * (1 + BLOCKS_AFTER * tried)
            seconds += tokens * (replays * pace.plain + (1 + tried) * loss) + reading
    return seconds


def _detected_tokens(sizes: Sizes) -> list[int]:
    """Tokens of every set of rows that detection walks with."""
    settings = sizes.recipe.detect
    rows = settings.rows * settings.length
    return [rows, rows, REPEATED_ROWS * settings.length, settings.long_rows * settings.long_length]
