"""Which key-value heads a smaller model keeps."""

from __future__ import annotations

from sinkquant.artifacts import SinkMap
from sinkquant.errors import RequestError


def kv_heads_to_keep(sink_map: SinkMap, possible: list[int], bound: float) -> list[list[int]]:
    """For every layer the key-value heads that stay, ascending: as few as `possible` allows and the no-op heads give.

    A key-value head goes where all queries that read it are no-ops, and where the loss of a token changes by no more
    than `bound` nats without them, each alone and with all that change less. Every layer loses as many.

    Args:
        possible: numbers of key-value heads that the architecture can be built with.

    Raises:
        RequestError: the sink map does not say what heads are worth, or no layer's heads can go.
    """
    found, facts = sink_map.head_ablations, sink_map.model
    if found is None:
        raise RequestError("the sink map does not say what heads are worth; run detect with --set prune.heads=no-op.")
    going: set[tuple[int, int]] = set()
    for head in found.heads:
        if max(head.loss_change, head.together) > bound:
            break
        going.add((head.layer, head.head))
    shared = facts.heads // facts.kv_heads
    # The order of the list: those that change least go first.
    order = list(dict.fromkeys((head.layer, head.head // shared) for head in found.heads))
    free = {layer: [kv for at, kv in order if at == layer and all(
        (layer, kv * shared + query) in going for query in range(shared))] for layer in range(facts.layers)}
    fewest = min(range(facts.layers), key=lambda layer: len(free[layer]))
    removable = min(len(free[fewest]), facts.kv_heads - 1)
    count = min((count for count in possible if count >= facts.kv_heads - removable), default=facts.kv_heads)
    if count >= facts.kv_heads:
        smaller = ", ".join(map(str, possible)) or "none"
        raise RequestError(
            f"no heads can be cut off: layer {fewest} has {len(free[fewest])} of {facts.kv_heads} key-value heads "
            f"whose queries are all no-ops, every layer has to lose as many, and transformers builds "
            f"{facts.architecture} with these smaller numbers: {smaller}. "
            "prune.heads=no-op in a recipe silences heads wherever they are.")
    return [sorted(set(range(facts.kv_heads)) - set(free[layer][:facts.kv_heads - count]))
            for layer in range(facts.layers)]
