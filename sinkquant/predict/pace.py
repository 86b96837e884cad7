"""What this machine takes for the work at hand, measured at the start of a run: the first block of the model itself
with a few rows, and the quantizer itself with small matrices. A few seconds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import nn

from sinkquant.costs import Pace, Rate
from sinkquant.detect.detectors import detectors_of
from sinkquant.detect.survey import Surveyor
from sinkquant.methods import need_hessian
from sinkquant.models import Decoder, Walk, pick_device, together
from sinkquant.models.experts import fused_parameters
from sinkquant.quantize import GPTQ, to_integers
from sinkquant.recipe import Recipe

OPERATIONS = 1e10
"""So many floating-point operations a probe of the first block is to take at most; a quarter of a second."""
MOST_TOKENS = 2048
FEW_ROWS, MANY_ROWS = 32, 512
TRIES = 2
"""The faster one counts: the other may be disturbed by what else the machine does."""


def measure(decoder: Decoder, recipe: Recipe, calibrated: bool) -> Pace:
    """Measure what a recipe needs for a model, which may be one from `open_model`; 0 for what it does not.

    Args:
        calibrated: whether rows walk while quantizing.
    """
    settings = recipe.detect
    long = settings.long_rows > 0 and min(settings.long_length, decoder.max_length) > settings.length
    # Inputs are recorded of one set: of the short rows only where there are no long ones.
    operation = _operation()
    watched = (_watched(decoder, recipe, settings.length, not long, operation),
               _watched(decoder, recipe, settings.long_length, long, operation))
    # What rows do not walk for is rounded only, and the other way round.
    few, many = (_solved(recipe, rows) for rows in (FEW_ROWS, MANY_ROWS)) if calibrated else (0.0, 0.0)
    column_row = max(0.0, many - few) / (MANY_ROWS - FEW_ROWS)
    rounded, kept = _rounded(recipe, not calibrated or not need_hessian(recipe.methods))
    return Pace(operation=operation, value=_value(), scored=_scored(), watched=watched,
                plain=_plain(decoder, recipe, operation), column=max(0.0, few - FEW_ROWS * column_row),
                column_row=column_row, rounded=rounded, kept=kept)


def _rows(decoder: Decoder, length: int) -> torch.Tensor:
    """Any rows, int64 [rows, length], with as many tokens as `OPERATIONS` allow."""
    length = min(length, decoder.max_length)
    tokens = min(MOST_TOKENS, int(OPERATIONS / (2 * _weights_of_a_token(decoder))))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(decoder.vocabulary, (max(1, tokens // length), length), generator=generator)


def _watched(decoder: Decoder, recipe: Recipe, length: int, recorded: bool, operation: float) -> Rate:
    def seconds(rows: torch.Tensor, tries: int) -> float:
        return min(Surveyor(decoder, recipe, None, detectors_of(decoder, recipe)).pace(rows, recorded)
                   for _ in range(tries))

    return _rate(decoder, _rows(decoder, length), operation, seconds)


def _rate(decoder: Decoder, rows: torch.Tensor, operation: float,
          seconds: Callable[[torch.Tensor, int], float]) -> Rate:
    """What several rows take over one row is what a token takes. Where `OPERATIONS` allow one row, it takes so long
    that nothing else counts. A mixture reads all of its experts for a few tokens, and what they take by themselves is
    too little to be timed: it is counted.

    Args:
        operation: seconds of one. seconds: the fastest of so many tries with some rows.
    """
    if _fused(decoder):
        token = 2 * _weights_of_a_token(decoder) * operation
        return Rate(max(0.0, seconds(rows, 1) - rows.numel() * token), token)
    many = seconds(rows, TRIES)
    if len(rows) == 1:
        return Rate(0.0, many / rows.numel())
    token = max(0.0, many - seconds(rows[:1], TRIES)) / rows[1:].numel()
    return Rate(max(0.0, many - rows.numel() * token), token)


def _fused(decoder: Decoder) -> int:
    """Weights of the experts in the first block."""
    return sum(one.numel() for one in fused_parameters(decoder.model, decoder.block_names[:1]).values())


def _weights_of_a_token(decoder: Decoder) -> float:
    """Weights of the first block that a token is multiplied with: of the experts those that it is sent to."""
    fused = fused_parameters(decoder.model, decoder.block_names[:1])
    config = decoder.model.config.get_text_config(decoder=True)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = min(1.0, chosen / len(next(iter(fused.values())))) if fused and chosen else 1.0
    weights = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    return weights - (1 - share) * _fused(decoder)


def _plain(decoder: Decoder, recipe: Recipe, operation: float) -> float:
    rows = _rows(decoder, recipe.calibration.length)

    def seconds(some: torch.Tensor, tries: int) -> float:
        walk = Walk(decoder, some, recipe.calibration.batch_size, pick_device(recipe.compute.device),
                    getattr(torch, recipe.compute.dtype))
        with contextlib.closing(together([walk])) as walking:
            (step,) = next(walking)
            return _fastest(lambda: step.replay(walk.hidden), tries)

    if not _fused(decoder):
        return seconds(rows, TRIES) / rows.numel()
    rate = _rate(decoder, rows, operation, seconds)
    # Experts are read once for all rows.
    return rate.token + rate.fixed / (recipe.calibration.rows * recipe.calibration.length)


def _solved(recipe: Recipe, rows: int) -> float:
    """Seconds per column of a matrix of so many rows."""
    settings = recipe.weights
    size = 64 if settings.group_size == -1 else settings.group_size
    columns = size * -(-64 // size)  # whole groups
    generator = torch.Generator().manual_seed(0)
    weight, seen = (torch.randn(size, columns, generator=generator) for size in (rows, 4 * columns))
    solver = GPTQ(settings.bits, settings.group_size, scale_search=settings.scale_search, passes=settings.descent)
    return _fastest(lambda: solver.quantize(weight, seen.T @ seen), TRIES) / columns


def _rounded(recipe: Recipe, nearest: bool) -> tuple[float, float]:
    from sinkquant.quantize.module import relative_error
    from sinkquant.schemes.codecs.packed import pack

    settings = recipe.weights
    columns = 1024 if settings.group_size == -1 else 8 * settings.group_size
    weight = torch.randn(256, columns, generator=torch.Generator().manual_seed(0))
    rounding = to_integers(settings.bits, settings.group_size, scale_search=settings.scale_search)
    packed = to_integers(settings.bits, settings.group_size, scale_search=False).quantize(weight)

    def keep() -> None:
        new = packed.dequantized(torch.bfloat16).float()
        relative_error(weight, new, None)
        pack(packed.codes, packed.bits)

    rounded = _fastest(lambda: rounding.quantize(weight), TRIES) / weight.numel() if nearest else 0.0
    return rounded, _fastest(keep, TRIES) / weight.numel()


def _operation() -> float:
    a = torch.ones(512, 512)
    return _fastest(lambda: a @ a, 4) / (2 * 512 ** 3)


def _value() -> float:
    a = torch.ones(256, 4096)
    return _fastest(lambda: torch.log_softmax(a, dim=-1), 3) / a.numel()


def _scored() -> float:
    logits, targets = torch.ones(16, 64, 4096), torch.zeros(16, 64, dtype=torch.long)
    return _fastest(lambda: nn.functional.cross_entropy(logits.transpose(1, 2), targets), 3) / logits.numel()


def _fastest(work: Callable[[], object], times: int) -> float:
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
