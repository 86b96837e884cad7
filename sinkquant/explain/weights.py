"""The parts of a checkpoint's weights in its loss: all to first order, the largest confirmed by putting them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.explanation import Cause, PartLoss
from sinkquant.explain.diagnose import Measuring, cause_in, percent
from sinkquant.explain.first_order import MIDDLE, NODES, first_order
from sinkquant.explain.parts import Part, first_block, put_back
from sinkquant.explain.probe import Probe
from sinkquant.explain.remedies import remedy
from sinkquant.recipe import Recipe

CONFIRMED = 8
"""Modules that are really put back: those with the largest part to first order, and the two with the largest error."""
GROUPS = 3
"""Layers and roles that are really put back."""
LOOKED_INTO = 3
"""Modules whose numbers are looked into, of those that remove most."""
ALONE = 0.5
"""Where no module by itself removes this share, the loss is spread, and the role that removes most is a cause too."""


@dataclass(frozen=True)
class WeightLosses:
    """What putting weights back says."""

    modules: list[PartLoss]
    layers: list[PartLoss]
    roles: list[PartLoss]
    causes: list[Cause]
    together: float


def weight_losses(probe: Probe, model: PreTrainedModel, parts: list[Part], measuring: Measuring,
                  sink_map: SinkMap | None, next_step: Callable[[str], None]) -> WeightLosses:
    """Modules, layers and roles by their part in the loss, and the causes that are found in them."""
    next_step("the part of every module")
    by_name, _ = first_order(probe, model, parts, NODES)
    modules = _by(parts, lambda part: part.module)
    losses = _losses(modules, by_name)
    largest = [one.name for one in losses[:CONFIRMED]]
    largest += [one.name for one in sorted(losses, key=lambda one: -one.error)[:2] if one.name not in largest]
    confirmed: dict[str, tuple[float, float]] = {}
    for name in largest:
        next_step(f"putting back {name}")
        with put_back(modules[name]):
            confirmed[name] = measuring.removes(first_block(modules[name]))
    next_step("putting back all of these")
    whole = [part for name in largest for part in modules[name]]
    with put_back(whole):
        together = measuring.removes(first_block(whole))[1]
    order = sorted(confirmed, key=lambda name: -confirmed[name][1])
    causes = _causes(probe, model, [modules[name] for name in order[:LOOKED_INTO]], confirmed, measuring, sink_map,
                     next_step)
    groups = []
    for kind, key in (("layer", lambda part: f"layer {part.layer}" if part.layer >= 0 else "outside the blocks"),
                      ("role", lambda part: part.role)):
        found = _by(parts, key)
        ranked = _losses(found, by_name)
        for place, one in enumerate(ranked[:GROUPS] if len(found) > 1 else []):
            next_step(f"putting back {kind} {one.name}")
            with put_back(found[one.name]):
                after, removes = measuring.removes(first_block(found[one.name]))
            ranked[place] = one.model_copy(update={"removes": removes})
            if kind == "role" and len(found[one.name]) > 1 and confirmed[order[0]][1] < ALONE:
                causes.append(_of_role(one.name, found[one.name], after, removes, measuring.recipe))
        groups.append(ranked)
    losses = [one.model_copy(update={"removes": confirmed[one.name][1]}) if one.name in confirmed else one
              for one in losses]
    return WeightLosses(losses, groups[0], groups[1], causes, together)


def _causes(probe: Probe, model: PreTrainedModel, chosen: list[list[Part]], confirmed: dict[str, tuple[float, float]],
            measuring: Measuring, sink_map: SinkMap | None, next_step: Callable[[str], None]) -> list[Cause]:
    """The causes inside the modules that remove most."""
    next_step("looking into the largest of them")
    _, single = first_order(probe, model, [part for parts in chosen for part in parts], MIDDLE, in_full=True)
    return [cause_in(parts, single, confirmed[parts[0].module], measuring, model, sink_map) for parts in chosen]


def _of_role(name: str, parts: list[Part], after: float, removes: float, recipe: Recipe) -> Cause:
    return Cause(kind="role", where=name, kl_after=after, removes=removes,
                 sentence=f"The loss is spread over all {len({part.module for part in parts})} of {name}: putting them "
                          f"back together removes {percent(removes)} of it.", **remedy("role", f"*.{name}", recipe))


def _by(parts: list[Part], key: Callable[[Part], str]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return found


def _losses(groups: dict[str, list[Part]], by_name: dict[str, float]) -> list[PartLoss]:
    """Largest first."""
    def error(parts: list[Part]) -> float:
        moved = sum(float((part.quantized - part.unquantized).double().square().sum()) for part in parts)
        return (moved / max(sum(float(part.unquantized.double().square().sum()) for part in parts), 1e-300)) ** 0.5

    found = [PartLoss(name=name, first_order=sum(by_name[part.name] for part in parts), error=error(parts))
             for name, parts in groups.items()]
    return sorted(found, key=lambda one: (-one.first_order, one.name))
