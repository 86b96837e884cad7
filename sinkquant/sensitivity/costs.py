"""What looking for sensitivities takes in memory."""

from __future__ import annotations

from sinkquant.costs import PIECES, SPILL_SHARE, Sizes, by_input
from sinkquant.methods import need_hessian
from sinkquant.models.attention import QUERY_CHUNK
from sinkquant.models.memory import LARGE
from sinkquant.quantize.bases import BATCH_ROWS
from sinkquant.quantize.costs import squares_bytes
from sinkquant.sensitivity.measure import DOUBLES

KEPT_OF_SMALL = 1.2
"""What is resident over what is in use where tensors are too small for the allocator to map each by itself."""


def sensitivity_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    settings, longest = sizes.recipe.sensitivity, sizes.decoder.max_length
    length = min(settings.length, longest)
    tokens, batch = settings.rows * length, settings.batch_size * length
    small = batch * sizes.hidden * sizes.item < LARGE
    solved = need_hessian(settings.methods or [sizes.recipe.weights.method])
    seen, solve = 0.0, 0.0
    for block in sizes.linears:
        free = [(name, linear) for name, linears in by_input(block).items() for linear in linears]
        wide = sum({name: linear.columns for name, linear in free}.values())
        # Every linear's gradient; of experts that of the layer, and what one of them makes of its tokens.
        wide += sum({(linear.part_of or i): sizes.hidden if linear.part_of else linear.rows
                     for i, (_, linear) in enumerate(free)}.values())
        wide += max((2 * (linear.rows + linear.columns) for _, linear in free if linear.part_of), default=0)
        seen = max(seen, float(tokens * wide * sizes.item))
        solve = max([solve, *(max(12.0 * linear.columns ** 2, (4.0 + (40 if solved else 0))
                                  * linear.columns ** 2 + 16 * linear.parameters + 12 * batch * linear.rows)
                              for _, linear in free)])
    peaks, watched = [], _walked_back(sizes, tokens, batch, length) + seen
    if sizes.recipe.tries_weights:
        peaks.append(watched + max(solve, _graph(sizes, batch, length)))
    if sizes.recipe.solves_inputs:  # an input's gradient and its error, and the weight between them
        pulled = max(8.0 * (tokens * linear.columns + linear.parameters) for block in sizes.linears for linear in block)
        peaks.append(watched + max(pulled, _graph(sizes, batch, length)))
    if settings.end_bits and sizes.recipe.tries_weights:  # the head, its rounded twin, and both predictions of a row
        peaks.append(sizes.vocabulary * sizes.hidden * (2 * sizes.item + sizes.stored) + 24.0 * length
                     * sizes.vocabulary + (len(sizes.linears) + 4) * tokens * sizes.hidden * sizes.item)
    if sizes.recipe.kv_tried:
        length = min(settings.kv_length, longest)
        batch = min(settings.kv_batch, settings.kv_rows) * length
        # Of the probabilities the half that is not zero, and of all else a chunk of queries.
        scores = 4.0 * batch * sizes.heads * (length / 2 + 7 * min(length, QUERY_CHUNK))
        peaks.append(_walked_back(sizes, settings.kv_rows * length, batch, length) + _graph(sizes, batch, length)
                     + scores)
        if settings.measure_rows:
            peaks.append(_measured(sizes, length, 3 * length) + sizes.activations(length, length))
        if squares := squares_bytes(sizes):
            length = min(sizes.recipe.calibration.length, longest)
            peaks.append(sizes.walked(sizes.held, sizes.expert) + sizes.activations(BATCH_ROWS * length, length)
                         + squares)
    if settings.measure_rows and sizes.recipe.tries_weights:
        length = min(settings.measure_length, longest)
        base, at_once = settings.measure_rows, min(settings.measure_rows, settings.batch_size)
        peaks.append(_measured(sizes, length, length * (base + 3 * at_once))
                     + 3.0 * tokens * sizes.hidden * sizes.item + solve)
    return (KEPT_OF_SMALL if small else 1.0) * (max(peaks) + PIECES)


def _measured(sizes: Sizes, length: int, logits: int) -> float:
    """The whole model, logits of so many tokens, and of a row of `length` tokens what is float64 at a time."""
    return (sizes.total * sizes.item + sizes.tensor * sizes.stored
            + 4.0 * sizes.vocabulary * (logits + 8 * min(length, DOUBLES)))


def _walked_back(sizes: Sizes, tokens: int, batch: int, length: int) -> float:
    """A walk back: a block, and what comes into every block and its gradient; or the head with a batch's logits."""
    states = tokens * sizes.hidden * sizes.item
    kept = 0 if states > sizes.memory / SPILL_SHARE else (len(sizes.linears) + 4) * states
    head = sizes.vocabulary * sizes.hidden * (sizes.item + sizes.stored) + 4 * 4.0 * batch * sizes.vocabulary
    return max(sizes.walked(sizes.block, 0), head - _graph(sizes, batch, length)) + kept


def _graph(sizes: Sizes, batch: int, length: int) -> float:
    """What one batch leaves in a block for the way back, beside inputs and gradients of the linears."""
    return sizes.activations(batch, length) + 3 * 4.0 * batch * sizes.heads * length
