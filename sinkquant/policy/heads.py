"""Which no-op heads are taken out, and which the control takes out instead."""

from __future__ import annotations

from collections import Counter

from sinkquant.artifacts import ModelShape, Plan, SinkMap
from sinkquant.artifacts.heads import HeadAblation, HeadAblations, SilencedHead
from sinkquant.errors import RequestError
from sinkquant.recipe import Recipe


def with_silenced_heads(plan: Plan, sink_map: SinkMap, recipe: Recipe) -> Plan:
    """The plan without the no-op heads of the sink map, as many of them as stay under `prune.head_loss`, each alone and
    all together.

    Raises:
        RequestError: the sink map does not say what heads are worth.
    """
    if recipe.prune.heads == "none":
        return plan
    found = _ablations(sink_map)
    bound, silenced = recipe.prune.head_loss, []
    for head in found.heads:
        if max(head.loss_change, head.together) > bound:
            break
        silenced.append(_silenced(head, f"a no-op on every text ({', '.join(found.texts)}): without it the loss of a "
                                        f"token changes by {head.loss_change:.2g} nats, {head.together:.2g} together "
                                        "with the heads before it"))
    notes = [*plan.notes, *([] if silenced else [_nothing(found, bound)])]
    if found.spared:
        named = ", ".join(f"head {one.head} of layer {one.layer} ({one.massive_left:.0%} would be left)"
                          for one in found.spared)
        notes.append(f"no-op heads that stay since they make massive activations: {named}; prune.massive=true takes "
                     "them out like any other")
    return _with(plan.model_copy(update={"notes": notes}), silenced)


def with_small_heads(plan: Plan, aware: Plan, sink_map: SinkMap) -> Plan:
    """A control's plan: as many heads of every layer as `aware` silences, those whose output weights are smallest."""
    if not aware.silenced_heads:
        return plan
    weights, silenced = _ablations(sink_map).weights, []
    for layer, count in sorted(Counter(head.layer for head in aware.silenced_heads).items()):
        like = next(head for head in aware.silenced_heads if head.layer == layer)
        width = like.stop - like.start
        smallest = sorted(range(len(weights[layer])), key=lambda head: (weights[layer][head], head))[:count]
        silenced += [SilencedHead(layer=layer, head=head, module=like.module, start=head * width,
                                  stop=(head + 1) * width, reason="its output weights are the smallest of its layer")
                     for head in sorted(smallest)]
    return _with(plan, silenced)


def accept_heads(plan: Plan, shape: ModelShape) -> list[SilencedHead]:
    """The silenced heads of a plan that a person has edited.

    Raises:
        RequestError: one of them is not in this model.
    """
    for head in plan.silenced_heads:
        linear = shape.linears.get(head.module)
        if linear is None or linear.block != head.layer or not 0 <= head.start < head.stop <= linear.columns:
            raise RequestError(f"the plan silences head {head.head} of layer {head.layer} in {head.module}, which this "
                               "model does not have.")
    return plan.silenced_heads


def _ablations(sink_map: SinkMap) -> HeadAblations:
    if sink_map.head_ablations is None:
        raise RequestError("prune.heads needs a sink map that says what heads are worth; run detect with --set "
                           "prune.heads=no-op.")
    return sink_map.head_ablations


def _silenced(head: HeadAblation, reason: str) -> SilencedHead:
    return SilencedHead(layer=head.layer, head=head.head, module=head.module, start=head.start, stop=head.stop,
                        reason=reason)


def _with(plan: Plan, silenced: list[SilencedHead]) -> Plan:
    modules = dict(plan.modules)
    by_module: dict[str, list[int]] = {}
    for head in silenced:
        if head.module not in modules:
            raise RequestError(f"the sink map is of another model: this one has no {head.module}; run detect on it.")
        by_module.setdefault(head.module, []).append(head.head)
    for name, heads in by_module.items():
        which = ", ".join(str(head) for head in sorted(heads))
        modules[name] = modules[name].model_copy(update={
            "reason": f"{modules[name].reason}; the columns of its heads {which} are zero"})
    return plan.model_copy(update={"modules": modules, "silenced_heads": silenced})


def _nothing(found: HeadAblations, bound: float) -> str:
    if not found.heads:
        return f"no head is taken out: none is a no-op on every text ({', '.join(found.texts)})"
    return (f"no head is taken out: of the {len(found.heads)} that are no-ops the least changes the loss of a token by "
            f"{found.heads[0].loss_change:.2g} nats, over prune.head_loss {bound:g}")
