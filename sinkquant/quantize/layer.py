"""The experts of a layer, one after the other, with its Hessians in memory alone."""

from __future__ import annotations

import torch

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.models import Decoder, Step
from sinkquant.models.experts import by_expert
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.experts import Routed, record
from sinkquant.quantize.module import quantize_module
from sinkquant.quantize.ranks import add_up, exchange, solver, this_rank
from sinkquant.quantize.statistics import TokenWeights


def record_experts(step: Step, decoder: Decoder, experts: dict[str, ModuleDecision],
                   ideal: torch.Tensor | None) -> dict[str, Routed]:
    """What the layer's experts are handed, before anything of the block is changed."""
    if not experts:
        return {}
    asymmetric = any(decision.method == "gptaq" for decision in experts.values())
    parts = [decoder.experts[name] for name in experts]
    return record(step, {part.owner: part.module for part in parts}, ideal if asymmetric else None)


def quantize_experts(step: Step, decoder: Decoder, todo: dict[str, ModuleDecision], routed: dict[str, Routed],
                     weights: TokenWeights, plan: Plan, made: QuantizedBlock) -> None:
    """One expert after the other, with its Hessians in memory alone; with several ranks, as many at a time as ranks."""
    rank, ranks = this_rank()
    for owner, one in routed.items():
        parts = {name: decoder.experts[name] for name in todo if decoder.experts[name].owner == owner}
        experts = list(by_expert(parts).items())
        made.tokens[owner] = one.counts()
        for start in range(0, len(experts), ranks):
            together = experts[start:start + ranks]
            hessians = {}
            for (_, index), _ in together:
                few = made.tokens[owner][index] < plan.calibration.min_expert_tokens
                for role, hessian in one.hessians(index, weights, few, step.walk.device, step.walk.dtype).items():
                    hessians[f"{index} {role}"] = hessian
            add_up(hessians, dict.fromkeys(hessians, one.module), one.ideal is not None)
            solved = QuantizedBlock(step.index, step.name, {}, {})
            decisions = {name: todo[name] for _, members in together for name in members}
            for place, (name, decision) in enumerate(decisions.items()):
                if solver(place) == rank or decision.bits >= 16:
                    part = decoder.experts[name]
                    quantize_module(decoder, name, decision, plan, solved, hessians[f"{part.index} {part.role}"])
            if ranks > 1:
                exchange(decoder, decisions, solved)
            made.weights.update(solved.weights)
            made.losses.update(solved.losses)
            made.kept.update(solved.kept)
    keep_dense(decoder, todo, made)


def keep_dense(decoder: Decoder, todo: dict[str, ModuleDecision], made: QuantizedBlock) -> None:
    """The fused parameters whose experts were changed and stay in 16 bits."""
    for name, decision in todo.items():
        part = decoder.experts.get(name)
        if decision.bits >= 16 and part is not None and (key := part.parameter) not in made.dense:
            made.dense[key] = decoder.model.get_parameter(key).data.to("cpu", decoder.model.dtype)
