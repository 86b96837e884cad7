"""A KV cache within a number of bits: groups and window before anything is measured, bits by sensitivity after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sinkquant.artifacts import KVCachePlan
from sinkquant.errors import RequestError
from sinkquant.recipe import KVCache

USUAL = 2
"""Bits of a code, about the mean of a small budget."""
SHORTEST = 8
"""A window is not halved below so many tokens."""
WINDOW_SHARE = 0.1
"""Of the bits that are asked for, what a window in full precision may take before a shorter one is preferred."""


def least_setting(settings: KVCache, fewest: int, groups: Sequence[int],
                  make: Callable[[KVCache], KVCachePlan]) -> KVCachePlan:
    """The cache that `kv_cache.bits` begins from, all codes of `fewest` bits.

    Group and window are chosen for codes of 2 bits, about the mean of a small budget. The group that takes the fewest
    bits at the length is taken, the smaller one of two alike: a larger group has fewer scales, and a longer unfinished
    block. What is left is spent better on the bits of single heads than on smaller groups: a range over 32 instead of
    128 numbers cuts the squared error of 2-bit codes by a third. The window is halved until it takes no more than its
    share.

    Args:
        fewest: bits of a code. groups: sizes that fit the model, ascending. make: settings -> plan with its sizes.

    Raises:
        RequestError: nothing is small enough; says what the smallest takes.
    """
    assert settings.bits is not None
    windows = [settings.window]
    while windows[-1] // 2 >= SHORTEST:
        windows.append(windows[-1] // 2)

    def tried(group: int, window: int, bits: int = max(fewest, USUAL)) -> KVCachePlan:
        return make(settings.model_copy(update={"bits": None, "key_bits": bits, "value_bits": bits,
                                                "group_size": group, "window": window}))

    sizes = [settings.group_size] if settings.group_size else groups
    least = min((tried(group, windows[-1]) for group in sizes), key=lambda plan: plan.bits_per_value)
    for window in windows[:-1]:
        fits = tried(least.group_size, window).bits_per_value <= settings.bits
        if fits and 16 * window / settings.length <= WINDOW_SHARE * settings.bits:
            return tried(least.group_size, window, fewest)
    least = tried(least.group_size, windows[-1], fewest)
    if least.bits_per_value > settings.bits:
        takes = math.ceil(1000 * least.bits_per_value) / 1000  # so that the number in the message can itself be met
        raise RequestError(f"kv_cache.bits {settings.bits:g} cannot be met at kv_cache.length {settings.length}: with "
                           f"{fewest}-bit codes, groups of {least.group_size} and the last {least.window} tokens exact "
                           f"a number takes {takes:.3f} bits; ask for that, or for a longer length"
                           f"{', or set kv_cache.scale_bits to 8' if settings.scale_bits > 8 else ''}.")
    return least
