"""Rounded inputs while a plan is carried out: hooks are put in front of a block's linears, static ones with the range
that calibration finds, and everything after that sees what an engine will see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder, Step
from sinkquant.models.hooks import hooked
from sinkquant.models.inputs import InputRanges, InputSwitch, input_args, round_inputs, share_switch, static_scale
from sinkquant.quantize.ranks import widest


def get_ready(decoder: Decoder, plan: Plan, done: int, scales: Mapping[str, torch.Tensor]) -> InputSwitch | None:
    """Round the inputs of the blocks that are done, and let the exact prefix of the plan through in all.

    Args:
        scales: the stored scales of the blocks that are done.
    """
    if not any(decision.rounded for decision in plan.modules.values()):
        return None
    switch = share_switch(decoder.model)
    switch.prefix = tuple(plan.kv_cache.prefix) if plan.kv_cache else ()
    for name in decoder.block_names[:done]:
        put(decoder, _inside(name, plan), scales)
    return switch


def put(decoder: Decoder, decisions: Mapping[str, ModuleDecision], scales: Mapping[str, torch.Tensor]) -> None:
    """Round the inputs of some linears as decided. scales: those of static ones."""
    args = {name: input_args(decision.activations, decision.activation_scale)
            for name, decision in decisions.items() if decision.rounded and decision.activation_scale}
    round_inputs(decoder.model, decoder.linears, args, scales)


def round_block(step: Step, decoder: Decoder, plan: Plan, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round the inputs of a block's linears from now on.

    The ranges of static ones are taken with all earlier blocks as they will be, and with the inputs that get a scale
    per token in this block rounded already.

    Args:
        dtype: of stored scales.

    Returns:
        module name -> stored scale, [1], of every static one.

    Raises:
        SinkquantError: no token reached a linear that needs a range.
    """
    mine = _inside(step.name, plan)
    static = {name: decision for name, decision in mine.items() if decision.ranged}
    put(decoder, {name: decision for name, decision in mine.items() if name not in static}, {})
    if not static:
        return {}
    ranges = _ranges(step, {name: decoder.linears[name] for name in static}, plan.calibration.ranges == "exclude")
    widest(ranges, list(static))
    scales = {}
    for name, decision in static.items():
        if name not in ranges.low:
            raise SinkquantError(f"no calibration token reached {name}, so that its inputs have no range; give more "
                                 "text, or round its inputs with scales that are not stored (activations.scale=token).")
        assert decision.activation_scale is not None
        args = input_args(decision.activations, decision.activation_scale)
        scales[name] = static_scale(ranges.low[name], ranges.high[name], args, dtype)
    put(decoder, static, scales)
    return scales


def front_of(plan: Plan) -> list[int]:
    """The tokens in front of every calibration row: those that the plan puts there, where inputs are rounded. The
    tokens after them then carry no outliers."""
    rounded = any(decision.rounded for decision in plan.modules.values())
    return plan.kv_cache.front if plan.kv_cache is not None and rounded else []


def in_front(rows: torch.Tensor, plan: Plan, limit: int) -> torch.Tensor:
    """Calibration rows with the tokens in front of them.

    Args:
        rows: int64 [rows, length]. limit: longest row that the model has positions for.
    """
    front = front_of(plan)
    if not front:
        return rows
    if len(front) >= limit:
        raise RequestError(f"the {len(front)} tokens in front of every row leave no room in a context of {limit}.")
    return torch.cat([torch.tensor(front).expand(len(rows), -1), rows], dim=1)[:, :limit]


def _ranges(step: Step, linears: Mapping[str, nn.Module], exclude: bool) -> InputRanges:
    """Replay the rows through a block and see the inputs of its linears."""
    ranges = InputRanges()

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            exact = step.walk.exact
            ranges.add(name, args[0], exact[step.batch] if exclude and exact is not None else None)

        return hook

    with hooked(module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()):
        step.replay(step.walk.hidden)
    return ranges


def _inside(block: str, plan: Plan) -> dict[str, ModuleDecision]:
    return {name: decision for name, decision in plan.modules.items()
            if name.startswith(f"{block}.") and decision.rounded}
