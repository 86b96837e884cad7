"""SinkMap + Recipe -> the KV section of a plan, and that of its control: no exact tokens, a longer window instead."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from sinkquant.artifacts import (
    KVCachePlan,
    KVLayer,
    KVLayerShape,
    KVSink,
    MassiveCarriers,
    ModelShape,
    SinkMap,
    SinkToken,
)
from sinkquant.artifacts.kv import KV_BITS, cache_bytes, dense_bytes, packed_tokens, value_group
from sinkquant.errors import RequestError
from sinkquant.policy.blocks import block_at
from sinkquant.policy.kv_bits import least_setting
from sinkquant.recipe import KVCache, Recipe

GROUPS = (32, 64, 128)
CARRIER_SHARE = 0.5
"""A token carries a massive activation where it reaches this share of the largest one that detection saw there."""
STAY_EXACT = "stay exact"
"""What a reason says of tokens that it names."""


def make_kv_plan(shape: ModelShape, sink_map: SinkMap, recipe: Recipe) -> KVCachePlan | None:
    """The KV section, or None where the recipe leaves the cache alone.

    Raises:
        RequestError: nothing in the model can be packed, or bits, groups, rotation or the policy do not fit it; or it
            cannot be as small as `kv_cache.bits` says. What that leaves is spent by `kv_budget.spent_by_loss`.
    """
    settings = recipe.kv_cache
    if settings is None:
        return None
    if settings.bits is not None:
        return least_setting(settings, min(recipe.kv_tried), _fitting_groups(shape),
                             lambda tried: _made(shape, sink_map, tried))
    return _made(shape, sink_map, settings)


def _made(shape: ModelShape, sink_map: SinkMap, settings: KVCache) -> KVCachePlan:
    group_size = settings.group_size or _fitting_groups(shape)[0]
    layers = _layers(shape, settings, group_size)
    sinks = _sinks(sink_map) if settings.exact == "detected" else []
    prefix = _prefix(sink_map, settings)
    plan = with_usual_bits(KVCachePlan(
        key_bits=settings.key_bits, value_bits=settings.value_bits, group_size=group_size,
        window=settings.window, evict=settings.evict, sliding_sinks=settings.sliding_sinks,
        symmetric=settings.symmetric, scale_bits=settings.scale_bits, rotate=settings.rotate,
        rotate_values=settings.rotate_values, scale_tokens=settings.scale_tokens, clip=settings.clip,
        rounding=settings.rounding,
        exact=settings.exact, first_n=settings.first_n if settings.exact == "first-n" else 0,
        max_exact=0 if settings.exact == "none" else settings.max_exact,
        prefix=prefix, front=_front(prefix, sink_map, settings), sinks=sinks, layers=layers,
        bits_per_value=0.0, length=settings.length, expected_exact=0, bytes=0, unquantized_bytes=0, reason=""))
    _check_sliding_sinks(plan, shape)
    if settings.exact == "massive":
        plan = plan.model_copy(update={"massive": _carriers(sink_map)})
    exact = _expected_exact(plan, sink_map.placed)
    reason = _reason(plan, sink_map.placed, exact)
    if settings.prefix == "found" and sink_map.outlier_prefix is not None:
        reason += f"; the found prefix is {' '.join(map(repr, sink_map.outlier_prefix.texts))}"
        reason += ", put in front of every row" if plan.front else " alone, which rows start with anyway"
    return _weighed(plan, exact, reason)


def make_kv_control(aware: KVCachePlan | None) -> KVCachePlan | None:
    """The same formats with protection off. What the exact tokens weigh is spent on a longer window, so that the
    control is never the smaller one."""
    if aware is None:
        return None
    control = aware.model_copy(update={"exact": "none", "first_n": 0, "max_exact": 0, "sinks": [], "massive": None,
                                        "prefix": [], "front": [], "sliding_sinks": False})
    if not any(bits < 16 for layer in aware.layers if layer.packed for bits in layer.key_bits + layer.value_bits):
        return _weighed(control, 0, "no head takes less than 16 bits, so that the control keeps every token exact too")
    longer = bisect.bisect_left(range(aware.window, aware.length), aware.bytes, key=lambda window: _mean_bytes(
        control.model_copy(update={"window": window}), 0))
    control = control.model_copy(update={"window": aware.window + longer})
    return _weighed(control, 0, f"the control keeps no token exact; its window is longer by {longer} tokens for the "
                                "same bytes")


def accept_kv(plan: KVCachePlan | None, shape: ModelShape) -> KVCachePlan | None:
    """An edited KV section, checked against the model, its sizes counted anew, and what tells them of exact tokens as
    far as that takes no sink map.

    Raises:
        RequestError: it is of another model, bits or groups do not fit, layers that share a mask differ, or one part of
            it says what another does not.
    """
    if plan is None:
        return None
    if len(plan.layers) != len(shape.kv_layers):
        raise RequestError(f"the plan's kv_cache has {len(plan.layers)} layers and this model has "
                           f"{len(shape.kv_layers)}.")
    if plan.group_size not in GROUPS:
        raise RequestError(f"the plan's kv_cache has groups of {plan.group_size}; set its group_size to "
                           f"{', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}.")
    if plan.front != plan.prefix[:len(plan.front)]:
        raise RequestError("the plan's kv_cache puts tokens in front of every row (front) that its prefix does not "
                           "begin with; make front the first tokens of prefix, or empty.")
    for index, (layer, real) in enumerate(zip(plan.layers, shape.kv_layers, strict=True)):
        if layer.packed and (real.heads == 0 or real.sliding_window != layer.sliding_window):
            raise RequestError(f"the plan packs layer {index} as one with {real.heads} KV heads and the sliding window "
                               f"{layer.sliding_window}; this model's has {real.sliding_window}.")
        if (len(layer.key_bits), len(layer.value_bits)) != (real.heads, real.heads):
            raise RequestError(f"the plan's kv_cache gives layer {index} bits for {len(layer.key_bits)} heads, and it "
                               f"has {real.heads}.")
        wrong = [bits for bits in layer.key_bits + layer.value_bits if bits not in KV_BITS]
        if wrong:
            raise RequestError(f"the plan's kv_cache gives layer {index} {wrong[0]} bits; give it 1, 2, 3, 4, 8 or 16.")
        if layer.packed:
            _check_fit(real, index, plan.group_size, plan)
    usual = with_usual_bits(plan)
    for key, said, found in (("key_bits", plan.key_bits, usual.key_bits),
                             ("value_bits", plan.value_bits, usual.value_bits)):
        if said != found:
            raise RequestError(f"the plan's kv_cache says {key} {said}, and most heads of its layers have {found}; the "
                               f"layers are what is packed, so edit those, and set {key} to the bits of most heads.")
    if plan.exact == "massive" and (plan.massive is None or not plan.massive.channels):
        raise RequestError("the plan's kv_cache keeps massive activations exact and names no channel that carries them "
                           "(massive); plan with kv_cache.exact=massive, or set exact to 'detected' or 'first-n'.")
    if plan.exact == "first-n" and plan.first_n == 0:
        raise RequestError("the plan's kv_cache keeps the first tokens exact, and first_n is 0; set it to their "
                           "number, or exact to 'none'.")
    _check_sliding_sinks(plan, shape)
    for slides in (True, False):
        kept = {layer.packed for layer, real in zip(plan.layers, shape.kv_layers, strict=True)
                if real.heads and (real.sliding_window is not None) == slides}
        if len(kept) > 1 and (slides or plan.evict is not None):
            raise RequestError("the plan's kv_cache packs some layers " + (
                "with" if slides else "without") + " a sliding window and not others, and the model makes one mask for "
                "the columns of them all; set 'packed' alike in them.")
    exact, reason = plan.expected_exact, plan.reason
    if plan.exact in ("none", "first-n") or (plan.exact == "detected" and not plan.sinks):
        exact = _expected_exact(plan, [])
        words = _reason(plan, [], exact)
        # A control says of itself why it keeps none.
        stays = reason.startswith(words) or (plan.exact == "none" and STAY_EXACT not in reason)
        reason = reason if stays else words
    return _weighed(plan, exact, reason)


def with_usual_bits(plan: KVCachePlan) -> KVCachePlan:
    """The section with the bits of most heads of its packed layers as `key_bits` and `value_bits`."""
    keys, values = ([bits for layer in plan.layers if layer.packed for bits in getattr(layer, name)]
                    for name in ("key_bits", "value_bits"))
    if not keys:
        return plan
    return plan.model_copy(update={name: max(sorted(set(bits)), key=bits.count)
                                   for name, bits in (("key_bits", keys), ("value_bits", values))})


def _mean_bytes(plan: KVCachePlan, exact: int) -> int:
    lengths = [max(1, plan.length - shorter) for shorter in range(plan.group_size)]
    return math.ceil(sum(cache_bytes(plan, tokens, min(exact, tokens)) for tokens in lengths) / len(lengths))


def _weighed(plan: KVCachePlan, exact: int, reason: str) -> KVCachePlan:
    total = _mean_bytes(plan, exact)
    dense = dense_bytes(plan, plan.length)
    return plan.model_copy(update={"bytes": total, "unquantized_bytes": dense, "expected_exact": exact,
                                   "bits_per_value": 16 * total / dense if dense else 16.0, "reason": reason})


def _fitting_groups(shape: ModelShape) -> list[int]:
    """The groups that divide the heads of every layer, ascending."""
    widths = {layer.value_dim for layer in shape.kv_layers if layer.heads}
    fitting = [size for size in GROUPS if all(width % value_group(size, width) == 0 for width in widths)]
    if not fitting:
        raise RequestError(f"kv_cache: no group of {', '.join(map(str, GROUPS))} divides heads of "
                           f"{' and '.join(map(str, sorted(widths)))} channels; remove the section.")
    return fitting


def _layers(shape: ModelShape, settings: KVCache, group_size: int) -> list[KVLayer]:
    layers = []
    for index, layer in enumerate(shape.kv_layers):
        if layer.heads == 0:
            layers.append(_left(layer, "it keeps no plain keys and values of its own"))
        elif layer.sliding_window is not None and layer.sliding_window <= settings.window + 2 * group_size:
            why = f"its sliding window of {layer.sliding_window} tokens leaves nothing to pack"
            # transformers' own cache drops sinks with the rest, so that such a layer takes ours, in 16 bits.
            layers.append(_left(layer, why) if not settings.sliding_sinks else _left(layer, why).model_copy(update={
                "packed": True, "sliding_window": layer.sliding_window,
                "reason": f"full precision: {why}; sees exact tokens beyond it"}))
        else:
            _check_fit(layer, index, group_size, settings)
            layers.append(KVLayer(
                packed=True, key_bits=[settings.key_bits] * layer.heads, value_bits=[settings.value_bits] * layer.heads,
                key_dim=layer.key_dim, value_dim=layer.value_dim, sliding_window=layer.sliding_window,
                reason=f"keys {settings.key_bits} bits, values {settings.value_bits} bits" + (
                    "; sees exact tokens beyond its sliding window"
                    if settings.sliding_sinks and layer.sliding_window is not None else "")))
    if not any(layer.key_bits for layer in layers):
        raise RequestError(f"kv_cache: no layer of {shape.architecture} caches plain keys and values (latent, chunked "
                           "and recurrent caches are not packed); set kv_cache=null.")
    for place, override in enumerate(settings.overrides):
        for index in override.layers:
            if not 0 <= index < len(layers) or not layers[index].packed:
                raise RequestError(f"kv_cache.overrides[{place}] names layer {index}, which is not packed.")
            chosen = layers[index]
            heads = range(len(chosen.key_bits)) if override.heads is None else override.heads
            if any(not 0 <= head < len(chosen.key_bits) for head in heads):
                raise RequestError(f"kv_cache.overrides[{place}] names KV heads {list(heads)}, and layer {index} has "
                                   f"{len(chosen.key_bits)}.")
            key_bits, value_bits = list(chosen.key_bits), list(chosen.value_bits)
            for head in heads:
                key_bits[head] = override.key_bits or key_bits[head]
                value_bits[head] = override.value_bits or value_bits[head]
            layers[index] = chosen.model_copy(update={"key_bits": key_bits, "value_bits": value_bits,
                                                      "reason": f"by kv_cache.overrides[{place}]"})
    return layers


def _left(layer: KVLayerShape, why: str) -> KVLayer:
    return KVLayer(packed=False, key_bits=[16] * layer.heads, value_bits=[16] * layer.heads, key_dim=layer.key_dim,
                   value_dim=layer.value_dim, reason=f"left as it is: {why}")


def _check_sliding_sinks(plan: KVCachePlan, shape: ModelShape) -> None:
    if not plan.sliding_sinks:
        return
    sliding = [index for index, layer in enumerate(shape.kv_layers) if layer.heads and layer.sliding_window is not None]
    if not sliding:
        raise RequestError(f"kv_cache.sliding_sinks: no layer of {shape.architecture} has a sliding window; set it to "
                           "false.")
    if plan.exact == "massive":
        raise RequestError("kv_cache.sliding_sinks needs sinks that are known before a pass, and 'massive' finds them "
                           "in it; use 'detected' or 'first-n'.")
    if plan.max_exact + len(plan.prefix) == 0 or (plan.exact == "none" and not plan.prefix):
        raise RequestError("kv_cache.sliding_sinks shows the exact tokens to sliding windows, and the cache keeps "
                           "none; set it to false, or kv_cache.exact to 'detected' or 'first-n'.")
    left = [index for index in sliding if not plan.layers[index].packed]
    if left:
        raise RequestError(f"kv_cache.sliding_sinks: the plan leaves layer {left[0]}, which has a sliding window, to "
                           "transformers' own cache; set its 'packed' to true and its 'sliding_window'.")


def _check_fit(layer: KVLayerShape, index: int, group_size: int, asked: KVCache | KVCachePlan) -> None:
    group = value_group(group_size, layer.value_dim)
    if layer.value_dim % group:
        fitting = [size for size in GROUPS if layer.value_dim % value_group(size, layer.value_dim) == 0]
        hint = f"use {' or '.join(map(str, fitting))}" if fitting else "no group size fits this model"
        raise RequestError(f"kv_cache.group_size {group_size} does not divide the {layer.value_dim} channels "
                           f"of a head in layer {index}; {hint}.")
    if asked.rounding == "descent" and asked.rotate != "covariance":
        raise RequestError("kv_cache.rounding 'descent' weighs errors by the queries of the calibration text, which "
                           "kv_cache.rotate 'covariance' takes; set that, or kv_cache.rounding to 'nearest'.")
    of_values = asked.rotate if asked.rotate_values is None else asked.rotate_values
    for key, rotation, width in (("rotate", asked.rotate, layer.key_dim),
                                 ("rotate_values", of_values, layer.value_dim)):
        if rotation == "hadamard" and width & (width - 1):
            raise RequestError(f"kv_cache.{key} 'hadamard' needs heads of a power of two channels, and layer {index} "
                               f"has {width}; set it to 'covariance' or 'none'.")


def _sinks(sink_map: SinkMap) -> list[KVSink]:
    """A sink that is bound to a position is kept there whatever token stands there: the position makes the sink."""
    return [KVSink(token_id=None if token.position is not None else token.token_id, position=token.position)
            for token in sink_map.placed]


def _prefix(sink_map: SinkMap, settings: KVCache) -> list[int]:
    if settings.prefix == "none":
        return []
    if settings.prefix == "found":
        return _found_prefix(sink_map)
    tokenization = sink_map.tokenization
    if tokenization.bos_token_id is None or not tokenization.rows_start_with_bos:
        raise RequestError("kv_cache.prefix is 'bos', but rows of this model do not start with <bos>; use 'none'.")
    return [tokenization.bos_token_id]


def _found_prefix(sink_map: SinkMap) -> list[int]:
    found = sink_map.outlier_prefix
    if found is None:
        raise RequestError("kv_cache.prefix is 'found', but outlier tokens were not looked for in this model (its sink "
                           "map is older, or its blocks have no one down projection); detect again, or use 'bos'.")
    if not found.token_ids:
        raise RequestError(f"kv_cache.prefix is 'found', but no outlier token was found in this model (the largest is "
                           f"{found.largest_ratio:.1f} times the median); use 'bos' or 'none'.")
    return found.token_ids


def _front(prefix: list[int], sink_map: SinkMap, settings: KVCache) -> list[int]:
    """What of a found prefix rows do not start with anyway: all but the `<bos>` at its end."""
    if settings.prefix != "found":
        return []
    return prefix[:-1] if sink_map.tokenization.rows_start_with_bos else prefix


def _carriers(sink_map: SinkMap) -> MassiveCarriers:
    """Where massive activations emerge, from the strongest channel, with all channels that are there by then."""
    known = [channel for channel in sink_map.channels if channel.profile and _block(channel.born) is not None]
    if not known:
        raise RequestError("kv_cache.exact is 'massive', but no massive channel was found in this model; use "
                           "'detected' or 'first-n'.")
    strongest = max(known, key=lambda channel: channel.ratio)
    emergence = _block(strongest.born) or 0
    place = max(index for index, label in enumerate(sink_map.depth) if _block(label) == emergence)
    floor = CARRIER_SHARE * strongest.profile[place]
    here = [channel for channel in known if channel.profile[place] >= floor]
    return MassiveCarriers(layer=emergence, channels=[channel.channel for channel in here],
                           thresholds=[CARRIER_SHARE * channel.profile[place] for channel in here])


def _block(label: str) -> int | None:
    """"layers.3.mlp" -> 3; the embedding shows after block 0."""
    return 0 if label == "embedding" else block_at(label)


def _expected_exact(plan: KVCachePlan, placed: Sequence[SinkToken]) -> int:
    """How many tokens of a row of `plan.length` will be kept, as far as the sinks of the map tell."""
    first = len(plan.prefix)
    if plan.exact == "none":
        return first
    if plan.exact == "first-n":
        return max(first, min(plan.first_n, plan.max_exact + first))
    tokens = [token for token in placed if plan.exact == "detected" or token.massive]
    count = first + sum(math.ceil(token.share * plan.length) if token.position is None else token.position >= first
                        for token in tokens)
    return min(count, plan.max_exact + first, plan.length)


def _reason(plan: KVCachePlan, placed: Sequence[SinkToken], exact: int) -> str:
    if not any(layer.packed for layer in plan.layers):
        return "nothing is packed: every layer's sliding window is shorter than what stays in full precision anyway"
    if packed_tokens(plan.length, plan.window, plan.group_size) == 0:
        return (f"nothing of a row of {plan.length} tokens is packed, because the window of {plan.window} and a block "
                f"of {plan.group_size} are as long; lower kv_cache.window, or plan for a longer kv_cache.length")
    room = plan.max_exact + len(plan.prefix)
    most = f", at most {room} in a row" if exact == room else ""
    if plan.exact == "detected":
        named = ", ".join(f"position {token.position}, whatever stands there" if token.text is None else
                          f"{token.text!r}" + (f" at {token.position}" if token.position is not None else "")
                          for token in placed)
        return (f"the sinks of the map {STAY_EXACT}: {named}{most}" if named else
                "the map holds no sink, so that none is kept")
    if plan.exact == "massive" and plan.massive is not None:
        return f"tokens that carry a massive activation after block {plan.massive.layer} {STAY_EXACT}{most}"
    kept = min(plan.first_n, room) if plan.exact == "first-n" else 0
    return f"the first {kept} tokens {STAY_EXACT}" if kept else "no token is kept exact"
