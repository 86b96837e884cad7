"""The experts of a layer, one after the other, with its Hessians in memory alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.methods import need_unquantized_inputs
from sinkquant.models import Decoder, Step
from sinkquant.models.experts import by_expert
from sinkquant.models.on_disk import ExpertsOnDisk
from sinkquant.quantize.block import QuantizedBlock, by_input
from sinkquant.quantize.experts import Routed, record
from sinkquant.quantize.module import fused_scales, quantize_modules
from sinkquant.quantize.ranks import add_up, exchange, solver, this_rank
from sinkquant.quantize.statistics import TokenWeights

WAITING = 1 << 25
"""Weights of quantized experts that wait in memory to be written."""


def record_experts(step: Step, decoder: Decoder, experts: dict[str, ModuleDecision],
                   ideal: torch.Tensor | None) -> dict[str, Routed]:
    """What the layer's experts are handed, before anything of the block is changed."""
    if not experts:
        return {}
    asymmetric = need_unquantized_inputs(decision.method for decision in experts.values())
    parts = [decoder.experts[name] for name in experts]
    return record(step, {part.owner: part.module for part in parts}, ideal if asymmetric else None)


def quantize_experts(step: Step, decoder: Decoder, todo: dict[str, ModuleDecision], routed: dict[str, Routed],
                     weights: TokenWeights, plan: Plan, tokens: dict[str, list[int]]) -> Iterator[QuantizedBlock]:
    """One expert after the other, with its Hessians in memory alone; with several ranks, as many at a time as ranks.
    What is done comes when it has `WAITING` weights, and then goes.

    Args:
        tokens: module name of a layer's experts -> calibration tokens that went to each; it is filled.
    """
    ranks = this_rank()[1]
    made, waiting = QuantizedBlock(step.index, step.name, {}, {}, ended=False), 0
    for owner, one in routed.items():
        parts = {name: decoder.experts[name] for name in todo if decoder.experts[name].owner == owner}
        experts = list(by_expert(parts).items())
        tokens[owner] = one.counts()
        for start in range(0, len(experts), ranks):
            together = {index: members for (_, index), members in experts[start:start + ranks]}
            few = {index for index in together if tokens[owner][index] < plan.calibration.min_expert_tokens}
            with _present(one, together):
                _solve(step, decoder, todo, together, few, one, weights, plan, made)
            waiting += sum(parts[name].weight.numel() for members in together.values() for name in members)
            if waiting >= WAITING:
                yield made
                made, waiting = QuantizedBlock(step.index, step.name, {}, {}, ended=False), 0
    yield made


@contextlib.contextmanager
def _present(one: Routed, experts: Iterable[int]) -> Iterator[None]:
    """Hold experts that lie on disk in memory, and keep what is done to them."""
    if one.on_disk is None:
        yield
        return
    with contextlib.ExitStack() as held:
        for index in experts:
            held.enter_context(one.on_disk.holding(index))
        yield
        for index in experts:
            one.on_disk.keep(index)


def _solve(step: Step, decoder: Decoder, todo: dict[str, ModuleDecision], experts: dict[int, list[str]],
           few: set[int], one: Routed, weights: TokenWeights, plan: Plan, made: QuantizedBlock) -> None:
    """Quantize as many experts as there are ranks. few: those of them that saw few tokens."""
    rank, ranks = this_rank()
    hessians = {f"{index} {role}": hessian for index in experts for role, hessian in one.hessians(
        index, weights, index in few, step.walk.device, step.walk.dtype).items()}
    add_up(hessians, dict.fromkeys(hessians, one.module), one.ideal is not None)
    decisions = {name: todo[name] for members in experts.values() for name in members}
    solved = QuantizedBlock(step.index, step.name, {}, {}, fused_scales=fused_scales(decoder, decisions, None))
    parts = {name: decoder.experts[name] for name in decisions}
    shared = by_input({name: f"{part.index} {part.role}" for name, part in parts.items()})
    for place, (read, names) in enumerate(shared.items()):
        here = {name: todo[name] for name in names if solver(place) == rank or todo[name].bits >= 16}
        quantize_modules(decoder, here, plan, solved, hessians[read])
    if ranks > 1:
        exchange(decoder, decisions, solved, shared)
    made.weights.update(solved.weights)
    made.losses.update(solved.losses)


def keep_dense(decoder: Decoder, todo: dict[str, ModuleDecision], made: QuantizedBlock,
               on_disk: Mapping[str, ExpertsOnDisk] | None = None) -> None:
    """The fused parameters whose experts were changed and stay in 16 bits. on_disk: those that are not in memory."""
    for name, decision in todo.items():
        part = decoder.experts.get(name)
        if decision.bits >= 16 and part is not None and (key := part.parameter) not in made.dense:
            stored = (on_disk or {}).get(part.owner)
            made.dense[key] = (decoder.model.get_parameter(key).data.to("cpu", decoder.model.dtype)
                               if stored is None else stored.whole(part.leaf))
