"""Linears whose inputs are rounded while a model runs, with the numerics that plain transformers has for a
compressed-tensors checkpoint.

A hook in front of every such linear rounds what it is given. All hooks of a model share one switch, which turns them
off and names the tokens that are let through as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import nn

from sinkquant.schemes import input_format
from sinkquant.schemes.inputs import of_e2m1

ROOM = 4.0
"""How far over the largest input of calibration a scale over the scales of groups reaches. Other texts have larger
inputs, and what is clipped there is a whole group at once. It costs two octaves of the fifteen that E4M3 has without
its subnormal numbers, and no precision of groups within 1/7000 of the largest input.
"""
SWITCH = "sinkquant_inputs"
"""The attribute of a model that holds its switch."""


def input_args(activations: str, scale: str) -> QuantizationArgs:
    """compressed-tensors' words for a plan's input format: "int8" and the like, "token", "tensor" or "group"."""
    return QuantizationArgs(**input_format(activations).arguments(scale))


@dataclass
class InputSwitch:
    """What all hooks of one model share.

    Attributes:
        enabled: whether inputs are rounded at all.
        exact: bool [rows, tokens] of the pass at hand, the tokens that are not rounded; None: all are.
        prefix: tokens whose keys and values come from the unquantized model where a row begins with them, or with the
            last of them. They do not come through the quantized linears of a model that is read through its prefix.
    """

    enabled: bool = True
    exact: torch.Tensor | None = None
    prefix: tuple[int, ...] = ()

    def begun_with_prefix(self, rows: torch.Tensor) -> torch.Tensor | None:
        """bool [rows, length]: the columns that hold the prefix at the beginning of a row; None without a prefix.

        Args:
            rows: int64 [rows, length], without padding.
        """
        if not self.prefix:
            return None
        flags = torch.zeros(rows.shape, dtype=torch.bool)
        for start in range(len(self.prefix)):  # the longest one first: shorter ones are not begun by the same tokens
            wanted = torch.tensor(self.prefix[start:], device=rows.device)
            if len(wanted) <= rows.shape[1]:
                begun = (rows[:, :len(wanted)] == wanted).all(1).cpu()
                flags[begun, :len(wanted)] = True
        return flags


@dataclass
class RoundedInputs:
    """The hook in front of one linear. `scale` is the stored one, [1] in 16 bits, or None where every token has its
    own; float32 where it stands over those of groups."""

    args: QuantizationArgs
    switch: InputSwitch
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given = inputs[0]
        if not self.switch.enabled or given.numel() == 0:
            return None
        rounded = self.rounded(given.detach(), module)
        exact = self.switch.exact
        if exact is not None and exact.numel() * given.shape[-1] == given.numel():
            rounded = torch.where(exact.to(given.device).reshape(*given.shape[:-1], 1), given.detach(), rounded)
        if torch.is_grad_enabled() and given.requires_grad:
            rounded = given + (rounded - given).detach()  # the gradient passes over the rounding
        return (rounded, *inputs[1:])

    def rounded(self, given: torch.Tensor, module: nn.Module | None = None) -> torch.Tensor:
        """What the linear computes with: [..., columns] on the grid of the format, in the dtype of what is given."""
        over = None
        if self.args.dynamic:
            over = None if self.scale is None else self.scale.to(given.device)
            scale, zero_point = compute_dynamic_scales_and_zp(given, self.args, module, over)
            if of_e2m1(self.args.type, self.args.num_bits):
                return _rounded_to_e2m1(given, scale if over is None else scale / over)
        else:
            assert self.scale is not None
            scale = self.scale.to(given.device, given.dtype)
            zero_point = None if self.zero_point is None else self.zero_point.to(given.device)
        return fake_quantize(given, scale, zero_point, self.args, over)


def nearest_e2m1_(twice: torch.Tensor) -> torch.Tensor:
    """Round to the nearest numbers of E2M1 in place, halves to the even code, and what is too large to the largest.

    twice: twice the values, float, any shape: from 4 on these are 2 apart, from 8 on 4.
    """
    size = twice.abs()
    step = (size > 4).to(twice.dtype).add_(size > 8, alpha=2).add_(1)
    return twice.div_(step).round_().mul_(step).clamp_(-12, 12)


def _rounded_to_e2m1(given: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What compressed-tensors' `fake_quantize` gives, bit by bit, in a fifth of its time on a CPU: it looks for every
    number of the grid in turn.

    given: [..., columns]; scale: [..., groups].
    """
    real = given.unflatten(-1, (scale.shape[-1], -1)) / scale[..., None]
    codes = nearest_e2m1_(real.mul_(2)).mul_(0.5).to(scale.dtype)
    return codes.mul_(scale[..., None]).flatten(-2).to(given.dtype)


def static_scale(low: torch.Tensor, high: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype) -> torch.Tensor:
    """The scale that reaches the largest input, as it is stored: [1] in the 16-bit `dtype`; float32 where it stands
    over the scales of groups, which it lets fill the range of FP8 with an input `ROOM` times as large.

    Args:
        low, high: scalars, the smallest and the largest input.
    """
    if args.strategy == "tensor_group":
        return generate_gparam(ROOM * low.float(), ROOM * high.float()).cpu()
    scale, _ = calculate_qparams(low.float(), high.float(), args)
    info = torch.finfo(dtype)
    return scale.clamp(max(info.tiny * info.eps, torch.finfo(torch.float32).tiny), info.max).to(dtype).cpu()


def switch_of(model: nn.Module) -> InputSwitch | None:
    """The switch of a model whose inputs are rounded somewhere, or None."""
    switch = getattr(model, SWITCH, None)
    return switch if isinstance(switch, InputSwitch) else None


def share_switch(model: nn.Module) -> InputSwitch:
    """The switch of a model, made now where it has none."""
    switch = switch_of(model)
    if switch is None:
        switch = InputSwitch()
        setattr(model, SWITCH, switch)
        model.register_forward_pre_hook(Forget(switch))
    return switch


def let_through(model: nn.Module, prefix: Sequence[int]) -> None:
    """Tell a model whose inputs are rounded which tokens have keys and values of the unquantized model; nothing where
    no inputs are rounded."""
    switch = switch_of(model)
    if switch is not None and prefix:
        switch.prefix = tuple(prefix)


def round_inputs(model: nn.Module, linears: Mapping[str, nn.Module], args: Mapping[str, QuantizationArgs],
                 scales: Mapping[str, torch.Tensor], zero_points: Mapping[str, torch.Tensor] | None = None) -> None:
    """Put a hook in front of some linears of a model.

    Args:
        linears: module name -> linear, of all that are named in `args`.
        args: module name -> format. scales: module name -> stored scale of every static one.
    """
    for name, one in args.items():
        switch = share_switch(model)
        linears[name].register_forward_pre_hook(
            RoundedInputs(one, switch, scales.get(name), (zero_points or {}).get(name)))


def share_rounding(model: nn.Module, twin: nn.Module) -> None:
    """Let a model with the same modules round the inputs of its linears as another does, with the same switch."""
    if switch_of(model) is not None:
        setattr(twin, SWITCH, switch_of(model))
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, RoundedInputs | Forget):
                twin.get_submodule(name).register_forward_pre_hook(hook)


@dataclass
class Forget:
    """In front of a whole model: what was let through in the last pass says nothing about the next one. A cache that
    starts from a prefix says so afterwards."""

    switch: InputSwitch

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.switch.exact = None


@contextlib.contextmanager
def inputs_left_alone(model: nn.Module) -> Iterator[None]:
    """Round nothing while the context is open."""
    switch = switch_of(model)
    before = switch.enabled if switch else False
    try:
        if switch:
            switch.enabled = False
        yield
    finally:
        if switch:
            switch.enabled = before


@dataclass
class InputRanges:
    """The smallest and the largest input of some linears, over all tokens or those that are not let through.

    Attributes:
        low, high: module name -> scalar.
    """

    low: dict[str, torch.Tensor] = field(default_factory=dict)
    high: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, left_out: torch.Tensor | None) -> None:
        """inputs: [..., columns]; left_out: bool, one per token."""
        if left_out is not None and left_out.numel() * inputs.shape[-1] == inputs.numel():
            inputs = inputs.flatten(0, -2)[~left_out.flatten().to(inputs.device)]
        if not inputs.numel():
            return
        low, high = torch.aminmax(inputs)
        if name in self.low:
            low, high = torch.minimum(low, self.low[name]), torch.maximum(high, self.high[name])
        self.low[name], self.high[name] = low, high
