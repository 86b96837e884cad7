"""What quantizing the weights takes, in memory and time; what a method takes for a matrix it says itself."""

from __future__ import annotations

from collections.abc import Sequence

from sinkquant.artifacts import LinearShape
from sinkquant.cache.bases import ROWS as ROTATION_ROWS
from sinkquant.costs import KEPT_BY_ALLOCATOR, SPILL_SHARE, Pace, Sizes, by_input
from sinkquant.methods import method_named, methods_of
from sinkquant.models import Decoder
from sinkquant.models.alone import in_groups
from sinkquant.models.experts import fused_parameters
from sinkquant.quantize.bases import BATCH_ROWS
from sinkquant.quantize.layer import WAITING
from sinkquant.quantize.refine.distill import LOGITS_BYTES
from sinkquant.quantize.refine.refine import ROWS
from sinkquant.quantize.rounded import TOGETHER
from sinkquant.recipe import Recipe

RELOADED = 1 << 30
"""Bytes of a checkpoint up to which it is loaded again as a whole and compared."""


def quantize_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    dense = 2 * sizes.total * sizes.stored if sizes.total * sizes.stored <= RELOADED else 0
    settings = sizes.recipe.calibration
    if not sizes.calibrated:
        read = sizes.block if sizes.recipe.prune.zeros else _read_at_once(sizes.decoder)
        states = _cache_tokens(sizes.recipe) * sizes.hidden * sizes.item
        batch = BATCH_ROWS if sizes.recipe.kv_cache_scheme is None else settings.batch_size
        walked = 0.0 if not states else sizes.walked(sizes.held, sizes.expert) + 3 * states + sizes.activations(
            batch * settings.length, settings.length) + squares_bytes(sizes)
        return max(read * (sizes.stored + 1) + sizes.largest * (4 + sizes.stored), walked, dense)
    states = settings.rows * settings.length * sizes.hidden * sizes.item
    whole = sizes.scaled or sizes.asymmetric or sizes.recipe.weights.tune > 0
    held, expert = (sizes.block, 0) if whole else (sizes.held, sizes.expert)
    buffers = 0 if states > sizes.memory / SPILL_SHARE else (6 if expert else 3) * states
    codes = held + (max(WAITING, expert) if expert else 0)
    if sizes.block * sizes.stored <= sizes.memory / SPILL_SHARE:
        codes += sizes.stored * (sizes.block - held)  # what experts on disk were changed to
    hessians, solve = 0.0, 0.0
    methods = methods_of(sizes.recipe.methods)
    for block in sizes.linears:
        inputs = by_input(block).values()
        sums = 8.0 * sum(linears[0].columns ** 2 for linears in inputs)
        hessians = max(hessians, sums + 4 * max((linears[0].columns ** 2 for linears in inputs), default=0))
        solve = max([solve, *(sums + method.cost(_together(linears), sizes.recipe.weights).bytes
                              for linears in inputs for method in methods)])
    return max(sizes.walked(held, expert) + codes + buffers + max(
        hessians + sizes.activations(settings.batch_size * settings.length, settings.length), solve,
        squares_bytes(sizes)), dense)


def quantize_seconds(sizes: Sizes, pace: Pace) -> float:
    """Seconds of one checkpoint: walking, Hessians, solving, packing, writing."""
    seconds = sizes.weights * pace.kept + 2 * pace.reading(sizes)
    seconds += _cache_tokens(sizes.recipe) * len(sizes.linears) * pace.plain
    if not sizes.calibrated:
        return seconds + (sizes.weights * pace.rounded if sizes.recipe.methods else 0.0)
    settings, method = sizes.recipe.calibration, method_named(sizes.recipe.weights.method)
    tokens = settings.rows * settings.length
    seconds += tokens * len(sizes.linears) * pace.plain * (4 if sizes.asymmetric else 2)
    for block in sizes.linears:
        for linears in by_input(block).values():
            seconds += 2.0 * tokens * linears[0].columns ** 2 * pace.operation
            for matrix in [] if not sizes.recipe.methods else linears if linears[0].part_of else [_together(linears)]:
                cost = method.cost(matrix, sizes.recipe.weights)
                seconds += cost.operations * pace.operation + cost.rounded * pace.rounded
                seconds += cost.columns * (pace.column + pace.column_row * matrix.rows)
    return seconds + (distill_seconds(sizes, pace) if sizes.recipe.weights.distill else 0.0)


def _cache_tokens(recipe: Recipe) -> int:
    """Tokens that walk through the unquantized model for the rotations of a KV cache, or for its scales in FP8."""
    if recipe.kv_cache_scheme is not None:  # beside which nothing is rotated
        return recipe.calibration.rows * recipe.calibration.length
    return ROTATION_ROWS * recipe.calibration.length if _rotated(recipe) else 0


def _rotated(recipe: Recipe) -> bool:
    return recipe.kv_cache is not None and "covariance" in (recipe.kv_cache.rotate, recipe.kv_cache.rotate_values)


def squares_bytes(sizes: Sizes) -> float:
    """Of the squares of a batch's attention, half of the matrix, while a layer's rotations are found; 0 where none are.
    """
    length = min(sizes.recipe.calibration.length, sizes.decoder.max_length)
    return 2.0 * BATCH_ROWS * sizes.heads * length ** 2 if _rotated(sizes.recipe) else 0.0


def _together(linears: Sequence[LinearShape]) -> LinearShape:
    """What a method solves at once: the rows of all linears that read one input; experts come one after the other."""
    first = linears[0]
    return first if first.part_of else first.model_copy(update={"rows": sum(one.rows for one in linears)})


def _read_at_once(decoder: Decoder) -> int:
    """Weights of a block that are in memory together where no rows walk: its experts come a few at a time."""
    most = 0
    for name, block in zip(decoder.block_names, decoder.blocks, strict=True):
        fused = sum(parameter.numel() for parameter in fused_parameters(decoder.model, (name,)).values())
        alone = {part: one for part, one in decoder.experts.items() if part.startswith(f"{name}.")}
        groups = [sum(alone[part].weight.numel() for part in group) for group in in_groups(alone, TOGETHER)]
        most = max(most, sum(p.numel() for p in block.parameters()) - fused, *groups)
    return most


def distill_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    settings, tuned = sizes.recipe.calibration, sum(
        linear.parameters for block in sizes.linears for linear in block if not (linear.fixed or linear.part_of))
    rows = max(1, min(ROWS, LOGITS_BYTES // (4 * sizes.vocabulary * settings.length)))
    tokens = rows * settings.length
    head = sizes.vocabulary * sizes.hidden * (sizes.stored + sizes.item) if sizes.recipe.weights.lm_head < 16 else 0
    # Dense weights, and of every tuned one its gradient, its code, and where codes move how far, from where.
    codes = 4 + 3 if sizes.recipe.weights.distill_codes else 1
    weights = sizes.total * sizes.item + tuned * (sizes.item + codes) + 24 * sizes.largest
    states = settings.rows * settings.length * sizes.hidden * sizes.item
    blocks = len(sizes.linears) * tokens * (6 * sizes.widest + 12 * sizes.hidden) * sizes.item
    return KEPT_BY_ALLOCATOR * (weights + head + states + blocks + 7 * 4.0 * tokens * sizes.vocabulary)


def distill_seconds(sizes: Sizes, pace: Pace) -> float:
    """Seconds of all steps, and of the unquantized model's answers before them."""
    settings = sizes.recipe.calibration
    tokens, tuned = settings.rows * settings.length, sizes.recipe.weights.distill * ROWS * settings.length
    head = 2.0 * sizes.vocabulary * sizes.hidden
    return ((3 * tuned + 2 * tokens) * len(sizes.linears) * pace.plain
            + (3 * tuned + 4 * tokens) * head * pace.operation)
