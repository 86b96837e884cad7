"""A KV cache within a number of bits: groups and window before anything is measured, bits by sensitivity after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sinkquant.artifacts import KVCachePlan
from sinkquant.errors import RequestError
from sinkquant.recipe import KVCache

FEWEST = 2
SHORTEST = 16
"""A window is not halved below so many tokens."""
WINDOW_SHARE = 0.1
"""Of the bits that are asked for, what a window in full precision may take before a shorter one is preferred."""


def least_setting(settings: KVCache, groups: Sequence[int], make: Callable[[KVCache], KVCachePlan]) -> KVCachePlan:
    """The cache that `kv_cache.bits` begins from, all codes of 2 bits.

    The largest group is taken: a range over 32 instead of 128 numbers costs 0.75 bits and cuts the squared error of
    2-bit codes by a third, the same bits spent on 3-bit codes for three heads of four by more. The window is halved
    until it takes no more than its share.

    Args:
        groups: sizes that fit the model, ascending. make: settings -> plan with its sizes.

    Raises:
        RequestError: nothing is small enough; says what the smallest takes.
    """
    assert settings.bits is not None
    group = settings.group_size or groups[-1]
    windows = [settings.window]
    while windows[-1] // 2 >= SHORTEST:
        windows.append(windows[-1] // 2)
    made = [make(settings.model_copy(update={"bits": None, "key_bits": FEWEST, "value_bits": FEWEST,
                                             "group_size": group, "window": window})) for window in windows]
    for plan in made:
        if plan.bits_per_value <= settings.bits and 16 * plan.window / settings.length <= WINDOW_SHARE * settings.bits:
            return plan
    least = made[-1]
    if least.bits_per_value > settings.bits:
        raise RequestError(f"kv_cache.bits {settings.bits:g} cannot be met at kv_cache.length {settings.length}: with "
                           f"2-bit codes, groups of {least.group_size} and the last {least.window} tokens exact a "
                           f"number takes {least.bits_per_value:.3f} bits; ask for that, for a longer length, or for "
                           "kv_cache.symmetric.")
    return least
