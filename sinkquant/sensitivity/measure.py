"""The measured estimate: forward passes with one unit quantized, at the sinks, elsewhere, and everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import Terms
from sinkquant.models import Decoder, Step, Walk, pick_device
from sinkquant.models.hooks import compute_in, evaluating, hooked
from sinkquant.models.steps import Progress
from sinkquant.models.walk import stubbed
from sinkquant.quantize.experts import record
from sinkquant.quantize.hessian import Hessian, collect
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import Unit, errors

DOUBLES = 128
"""Tokens whose log-probabilities are in float64 at a time."""


def measure(decoder: Decoder, units: list[Unit], rows: torch.Tensor, sinks: torch.Tensor, weights: TokenWeights,
            recipe: Recipe, progress: Progress | None = None) -> list[list[Terms]]:
    """KL divergence of every candidate of every unit, everything else being unquantized.

    A unit's candidates start from the inputs of its block, and run the blocks from there on.

    Args:
        decoder: of a model in memory.
        rows: int64 [rows, length], what is measured on. sinks: bool, alike.
        weights: the rows that Hessians are taken of, and what their tokens weigh.
    """
    stored, size = decoder.model.dtype, recipe.sensitivity.batch_size
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    found: dict[int, list[Terms]] = {}
    total, done = sum(len(unit.candidates) for unit in units), 0
    with evaluating(decoder.model), compute_in([decoder.model], device, dtype):
        with torch.no_grad():
            base = [torch.log_softmax(decoder.model(batch.to(device), use_cache=False).logits.float(), -1)
                    for batch in rows.split(size)]
        inputs = [step.walk.hidden for step in Walk(decoder, rows, size, device, dtype).steps()]
        for step in Walk(decoder, weights.rows, size, device, dtype).steps():
            mine = {index: unit for index, unit in enumerate(units) if unit.block == step.index}
            hessians = _hessians(step, decoder, list(mine.values()), weights, recipe)
            for index, unit in mine.items():
                found[index] = []
                for changes in _changes(decoder, unit, hessians, recipe, stored):
                    terms = [_divergence(decoder, step.index, inputs[step.index], rows, base, changes, places)
                             for places in (sinks, ~sinks, torch.ones_like(sinks))]
                    found[index].append(Terms(sinks=terms[0], others=terms[1], total=terms[2]))
                    done += 1
                    if progress:
                        progress(done, total, "measuring candidates")
    return [found[index] for index in range(len(units))]


def _hessians(step: Step, decoder: Decoder, units: list[Unit], weights: TokenWeights,
              recipe: Recipe) -> dict[str, torch.Tensor]:
    """Module -> Hessian of its input; zeros where no token reaches it. Linears that engines fuse read one input."""
    first = {name: unit.modules[0] for unit in units if not unit.owner for name in unit.modules}
    taken = collect(step, {name: decoder.linears[name] for name in first.values()}, weights)
    found = {}
    for name, source in first.items():
        columns = decoder.weight(source).shape[1]
        found[name] = taken.get(source, Hessian(columns, torch.device(step.walk.device))).mean()
    owners = {unit.owner: unit for unit in units if unit.owner}
    routed = record(step, {owner: decoder.model.get_submodule(owner) for owner in owners}) if owners else {}
    for owner, unit in owners.items():
        counts = routed[owner].counts()
        for index, count in enumerate(counts):
            few = count < recipe.calibration.min_expert_tokens
            of_expert = routed[owner].hessians(index, weights, few, step.walk.device, step.walk.dtype)
            found |= {name: of_expert[part.role].mean() for name in unit.modules
                      if (part := decoder.experts[name]).index == index}
    return found


def _changes(decoder: Decoder, unit: Unit, hessians: dict[str, torch.Tensor], recipe: Recipe,
             stored: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """For every candidate: module -> quantized weight - weight."""
    each = [errors(decoder, names, hessians[names[0]], unit.candidates, recipe, stored) for names in unit.by_input]
    for ones in zip(*each, strict=True):
        yield {name: error for _, changes in ones for name, error in changes.items()}


def _divergence(decoder: Decoder, block: int, inputs: torch.Tensor, rows: torch.Tensor, base: list[torch.Tensor],
                changes: dict[str, torch.Tensor], places: torch.Tensor) -> float:
    """Mean KL divergence in nats per token, with the changes applied at some places: bool [rows, length]."""
    if not bool(places.any()):
        return 0.0
    total, start = 0.0, 0
    for before in base:
        batch, device = slice(start, start + len(before)), before.device
        with (_changed(decoder, changes, places[batch].to(device)),
              stubbed(decoder, inputs[batch].to(device), block), torch.no_grad()):
            after = torch.log_softmax(decoder.model(rows[batch].to(device), use_cache=False).logits.float(), -1)
        total += sum(divergence(one, other) for one, other in zip(before, after, strict=True))
        start += len(before)
    return total / rows.numel()


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL(before || after) of log-probabilities [tokens, vocabulary] in nats, summed over the tokens. Both add up to 1:
    so written, no term is below zero, and a small sum stays exact."""
    total = 0.0
    for some, others in zip(before.split(DOUBLES), after.split(DOUBLES), strict=True):
        change = (others - some).double()
        total += float((some.double().exp() * (change.expm1() - change)).sum())
    return total


@contextlib.contextmanager
def _changed(decoder: Decoder, changes: dict[str, torch.Tensor], places: torch.Tensor) -> Iterator[None]:
    """Add the changes to weights, for the tokens at some places only. Tokens that a router sends to a linear of its own
    are at none that is known: they change where all but the sinks do."""
    here = places.reshape(-1, 1)

    def hook_for(change: torch.Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            added = args[0] @ change.to(args[0].dtype).T
            if output.shape[:-1].numel() != places.numel():
                return output + added if int(places.sum()) * 2 > places.numel() else output
            return output + added * here.reshape(*output.shape[:-1], 1)

        return hook

    def hook_of_experts(names: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 output: torch.Tensor) -> torch.Tensor:
            kept = {name: decoder.weight(name).clone() for name in names}
            for name in names:
                decoder.put(name, kept[name] + changes[name].to(kept[name].dtype))
            changed = module.forward(*args, **kwargs)
            for name in names:
                decoder.put(name, kept[name])
            return torch.where(here.reshape(*output.shape[:-1], 1), changed, output)

        return hook

    experts: dict[str, list[str]] = {}
    for name in changes:
        if name in decoder.experts:
            experts.setdefault(decoder.experts[name].owner, []).append(name)
    handles = [decoder.linears[name].register_forward_hook(hook_for(change)) for name, change in changes.items()
               if name not in decoder.experts]
    handles += [decoder.model.get_submodule(owner).register_forward_hook(hook_of_experts(names), with_kwargs=True)
                for owner, names in experts.items()]
    with hooked(handles):
        yield
