"""Modules that have to share a format: what engines fuse, and experts."""

from __future__ import annotations

from dataclasses import replace

from sinkquant.artifacts import LinearShape, ModelShape
from sinkquant.policy.rules import Draft


def share_formats(choices: dict[str, Draft], shape: ModelShape) -> dict[str, Draft]:
    """Give modules that engines fuse one format: that of their most precise member."""
    shared = dict(choices)
    for name, linear in shape.linears.items():
        if linear.part_of:
            continue
        group = [member for member in linear.fused_with if not shape.linears[member].fixed]
        if len(group) < 2 or name != group[0]:
            continue
        best = max(group, key=lambda member: (shared[member].bits, -_columns_per_scale(shared[member], linear)))
        for member in group:
            if shared[member].form != shared[best].form:
                kept = shared[best].columns if shared[best].keep == "split" else ()
                shared[member] = replace(
                    shared[best], reason=f"{shared[best].bits} bits: engines fuse it with {best}", columns=kept)
    return _share_experts(shared, shape)


def moves_together(name: str, choices: dict[str, Draft], shape: ModelShape) -> list[str]:
    """The modules whose formats change with that of `name`; empty where another of them speaks for the group.

    Experts of a layer that is left in 16 bits stay there whatever happens to the others.
    """
    linear = shape.linears[name]
    members = linear.fused_with or [name]
    if members[0] != name:
        return []
    return [member for member in members if choices[member].quantized] if linear.part_of else members


def _share_experts(choices: dict[str, Draft], shape: ModelShape) -> dict[str, Draft]:
    """A layer's experts are all packed or all left in 16 bits, and all packed ones have the format of the most precise
    (`artifacts/experts.py` says why)."""
    experts = {name: linear for name, linear in shape.linears.items() if linear.part_of}
    if not experts:
        return choices
    shared = dict(choices)
    left: dict[int, str] = {}
    for name, linear in experts.items():
        if not choices[name].quantized:
            left.setdefault(linear.block, name)
    for name, linear in experts.items():
        if linear.block in left and choices[name].quantized:
            first = left[linear.block]
            shared[name] = replace(choices[first], columns=(), reason=(
                f"left in 16 bits: transformers loads a layer's experts all packed or all dense, and {first} is left "
                "in 16 bits"))
    packed = [name for name in experts if shared[name].quantized]
    if packed:
        best = max(packed, key=lambda name: (shared[name].bits, -_columns_per_scale(shared[name], experts[name])))
        for name in packed:
            if shared[name].form != shared[best].form:
                shared[name] = replace(shared[best], columns=(), method=shared[name].method, reason=(
                    f"{shared[best].bits} bits: transformers loads all packed experts in one format, that of {best}"))
    return shared


def _columns_per_scale(choice: Draft, linear: LinearShape) -> int:
    return linear.columns if choice.group_size in (None, -1) else int(choice.group_size or 0)
