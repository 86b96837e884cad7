"""The KV cache's part of a budget: bits of every KV head's keys and values, and the bytes that they take."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.artifacts import KVCachePlan, KVLoss, ModelShape, Sensitivity
from sinkquant.artifacts.kv import cache_bytes, held_tokens, layer_bytes
from sinkquant.errors import RequestError
from sinkquant.policy.kv_cache import accept_kv, with_usual_bits
from sinkquant.policy.solver import ROUNDS, Option, least_loss
from sinkquant.recipe import Budget, Recipe


@dataclass(frozen=True, eq=False)
class KVUnit:
    """The keys or the values of one KV head, and what they may be packed in; the last option leaves them in 16 bits."""

    layer: int
    head: int
    kind: str
    losses: tuple[KVLoss, ...]

    @property
    def bits(self) -> list[int]:
        """The bits of every option."""
        return [*(loss.bits for loss in self.losses), 16]


def kv_bytes_of(shape: ModelShape, budget: Budget, plan: KVCachePlan | None) -> int:
    """Bytes of the KV cache that a budget counts: `batch` rows of `context` tokens, packed as the plan says, or in 16
    bits; 0 where the budget has no context."""
    if budget.context is None:
        return 0
    if plan is not None:
        packed = cache_bytes(plan, budget.context, min(plan.expected_exact, budget.context), budget.batch)
        left = [real for real, one in zip(shape.kv_layers, plan.layers, strict=True) if not one.packed]
    else:
        packed, left = 0, shape.kv_layers

    return packed + 2 * budget.batch * sum(
        held_tokens(budget.context, one.sliding_window) * (one.heads * (one.key_dim + one.value_dim) + one.latent)
        for one in left)


def kv_units(plan: KVCachePlan | None, sensitivity: Sensitivity, recipe: Recipe) -> list[KVUnit]:
    """What the solver may choose of the cache: nothing unless the recipe names `sensitivity.kv_bits`, nor where
    `kv_cache.bits` has chosen; not what `kv_cache.overrides` fixes.

    Raises:
        RequestError: bits of the cache are to be chosen and the sensitivities do not have its losses.
    """
    if not recipe.sensitivity.kv_bits or plan is None or recipe.solves_cache:
        return []
    if not sensitivity.kv:
        raise RequestError("the sensitivities hold no losses of the KV cache; make them anew with sensitivity.kv_bits.")
    return _units(plan, sensitivity, recipe)


def spent_by_loss(shape: ModelShape, plan: KVCachePlan, sensitivity: Sensitivity | None,
                  recipe: Recipe) -> KVCachePlan:
    """A cache of the fewest bits, with what `kv_cache.bits` leaves spent where heads were measured to lose most.

    Raises:
        RequestError: there are no sensitivities of the cache, or they are of too many bits or of another model.
    """
    settings = recipe.kv_cache
    assert settings is not None
    assert settings.bits is not None
    if sensitivity is None or not sensitivity.kv:
        raise RequestError("kv_cache.bits is met by sensitivities of the KV cache; make them with "
                           "sinkquant.find_sensitivity, or run quantize-model plan, which makes them itself.")
    units = _units(plan, sensitivity, recipe)
    table = kv_options(units, plan, Budget(bytes=1, context=settings.length))
    limit = int(settings.bits * plan.unquantized_bytes / 16)
    least = solved_cache(shape, plan, {unit: unit.bits[0] for unit in units})
    if least.bytes > limit:
        raise RequestError(f"kv_cache.bits {settings.bits:g} cannot be met in the bits that the sensitivities of the "
                           "KV cache hold; make them anew with fewer in sensitivity.kv_bits.")
    room = limit - least.bytes
    for _ in range(ROUNDS):
        found = least_loss(table, room)
        assert found is not None  # the fewest bits take no room
        made = solved_cache(shape, plan, {unit: unit.bits[option] for unit, option in
                                          zip(units, found.chosen, strict=True)})
        if made.bytes <= limit:
            return made
        # The window breathes by a block, and the table is of one length.
        room = max(0, room - (made.bytes - limit))
    return least


def _units(plan: KVCachePlan, sensitivity: Sensitivity, recipe: Recipe) -> list[KVUnit]:
    fixed = {(layer, head, kind) for override in recipe.kv_cache.overrides for layer in override.layers  # type: ignore[union-attr]
             for head in (override.heads if override.heads is not None else range(len(plan.layers[layer].key_bits)))
             for kind, bits in (("key", override.key_bits), ("value", override.value_bits)) if bits is not None}
    places: dict[tuple[int, int, str], list[KVLoss]] = {}
    for loss in sensitivity.kv:
        if loss.layer >= len(plan.layers) or loss.head >= len(plan.layers[loss.layer].key_bits):
            raise RequestError(f"the sensitivities are of another model: it has no KV head {loss.head} in layer "
                               f"{loss.layer}; make them for this one.")
        free = (loss.layer, loss.head, loss.kind) not in fixed and plan.layers[loss.layer].packed
        if free and loss.bits in recipe.kv_tried:
            places.setdefault((loss.layer, loss.head, loss.kind), []).append(loss)
    return [KVUnit(layer, head, kind, tuple(sorted(losses, key=lambda loss: loss.bits)))
            for (layer, head, kind), losses in places.items()]


def kv_options(units: list[KVUnit], plan: KVCachePlan, budget: Budget) -> list[list[Option]]:
    """Bytes and losses of every option: what the cache weighs with it more than with nothing but the smallest."""
    smallest = with_bits(plan, {unit: unit.bits[0] for unit in units})
    context = int(budget.context or 0)

    def weight(unit: KVUnit, bits: int) -> int:
        return layer_bytes(with_bits(smallest, {unit: bits}), unit.layer, context, 0, budget.batch)

    return [[Option(weight(unit, bits) - weight(unit, unit.bits[0]), loss)
             for bits, loss in zip(unit.bits, [*(one.weighed for one in unit.losses), 0.0], strict=True)]
            for unit in units]


def with_bits(plan: KVCachePlan, chosen: dict[KVUnit, int]) -> KVCachePlan:
    """The cache with other bits for some heads. Its own sizes are not counted anew."""
    layers = list(plan.layers)
    for unit, bits in chosen.items():
        name = f"{unit.kind}_bits"
        changed = list(getattr(layers[unit.layer], name))
        changed[unit.head] = bits
        layers[unit.layer] = layers[unit.layer].model_copy(update={name: changed})
    return plan.model_copy(update={"layers": layers})


def solved_cache(shape: ModelShape, plan: KVCachePlan, chosen: dict[KVUnit, int]) -> KVCachePlan:
    """The cache with the chosen bits, its sizes counted anew, and a reason for every layer with its figures."""
    made = with_bits(plan, chosen)
    layers = list(made.layers)
    for index in sorted({unit.layer for unit in chosen}):
        mine = {unit: bits for unit, bits in chosen.items() if unit.layer == index}
        losses = [loss for unit, bits in mine.items() for loss in unit.losses if loss.bits == bits]
        word = "measured" if any(loss.measured is not None for loss in losses) else "predicted"
        lost = sum(loss.loss for loss in losses)
        one = layers[index]
        keys, values = ("/".join(map(str, bits)) for bits in (one.key_bits, one.value_bits))
        parts = [f"keys {keys} and values {values} bits by head", f"{word} {lost:+.2g} nats"]
        idle = sorted({unit.head for unit in mine if unit.losses[0].no_op})
        if idle:
            parts.append(f"read by no-ops alone: head {', '.join(map(str, idle))}")
        layers[index] = one.model_copy(update={"reason": "; ".join(parts)})
    accepted = accept_kv(with_usual_bits(made.model_copy(update={"layers": layers})), shape)
    assert accepted is not None
    return accepted


def expected_kv_loss(plan: KVCachePlan | None, sensitivity: Sensitivity) -> float | None:
    """What the bits of a cache are predicted to lose, nats per token; None where it has some that were not tried."""
    if plan is None or not sensitivity.kv:
        return None
    known: dict[tuple[int, int, str, int], float] = {
        (loss.layer, loss.head, loss.kind, loss.bits): loss.loss for loss in sensitivity.kv}
    total = 0.0
    for index, layer in enumerate(plan.layers):
        for kind, heads in (("key", layer.key_bits), ("value", layer.value_bits)):
            for head, bits in enumerate(heads):
                if layer.packed and bits < 16:
                    if (index, head, kind, bits) not in known:
                        return None
                    total += known[index, head, kind, bits]
    return total
