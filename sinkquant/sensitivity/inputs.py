"""What rounding the inputs of linears would lose, every input alone: one walk back, to second order.

An error d of an input is an output error W d of every linear that reads it, so that what `estimate` says of g . e holds
for (W^T g) . d: of a linear that engines fuse with others the gradients are added up first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.sensitivity import InputLoss, InputSensitivity
from sinkquant.models import Decoder, Walk
from sinkquant.models.backward import steps_back
from sinkquant.models.inputs import InputSwitch, RoundedInputs, input_args, static_scale
from sinkquant.models.steps import Progress
from sinkquant.policy.choices import choices_of
from sinkquant.policy.input_bits import InputOption, input_options
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.schemes import input_format
from sinkquant.sensitivity.candidates import Unit
from sinkquant.sensitivity.seen import Seen, SeenBatch


@dataclass(frozen=True)
class InputUnit:
    """Linears that read one input, and what it may be rounded to."""

    unit: Unit
    options: tuple[InputOption, ...]


def input_units(decoder: Decoder, recipe: Recipe, sink_map: SinkMap) -> list[InputUnit]:
    """All inputs that the recipe rounds, in the order of the model."""
    shape = decoder.shape("")
    _, choices = choices_of(shape, sink_map, recipe)
    found = []
    for name, linear in shape.linears.items():
        members = tuple(linear.fused_with or [name])
        options = [option for option in input_options(choices[name], recipe.named_engine) if option.scale is not None]
        if members[0] == name and options:
            found.append(InputUnit(Unit(members, linear.block, ()), tuple(options)))
    return found


def input_losses(walk: Walk, units: list[InputUnit], sinks: torch.Tensor, weights: TokenWeights, recipe: Recipe,
                 progress: Progress | None = None) -> list[InputSensitivity]:
    """The predicted loss of every input in every format, in the order of the units; arguments as `estimate` has them.
    """
    decoder = walk.decoder
    found: dict[int, InputSensitivity] = {}
    for done, back in enumerate(steps_back(walk, recipe.seed)):
        mine = {index: one for index, one in enumerate(units) if one.unit.block == back.step.index}
        seen = Seen(back, decoder, [one.unit for one in mine.values()], weights, recipe)
        for index, one in mine.items():
            found[index] = _losses(one, decoder, seen, sinks)
        if progress:
            progress(done + 1, len(decoder.blocks), "sensitivities of inputs")
    return [found[index] for index in range(len(units))]


def _losses(one: InputUnit, decoder: Decoder, seen: Seen, sinks: torch.Tensor) -> InputSensitivity:
    parts = [seen.linears[name] for name in one.unit.modules]
    pulled = [sum(part.gradients.float() @ decoder.weight(name).float() for name, part in
                  zip(one.unit.modules, same, strict=True)) for same in zip(*parts, strict=True)]
    losses = []
    for option in one.options:
        score = torch.zeros(sinks.numel(), dtype=torch.float64)
        for part, gradient, error in zip(parts[0], pulled, _errors(option, parts[0], decoder), strict=True):
            assert part.places is not None  # experts read 16 bits
            score.index_add_(0, part.places, (gradient * error).sum(-1).double().cpu())
        score = score.reshape(sinks.shape)
        through = float(score.where(sinks, 0.0).sum(1).square().sum()) / 2 / sinks.numel()
        others = float(score.where(~sinks, 0.0).square().sum()) / 2 / sinks.numel()
        losses.append(InputLoss.model_validate({"activations": option.name, "scale": option.scale, "sinks": through,
                                                "total": through + others}))
    return InputSensitivity(modules=list(one.unit.modules), losses=losses)


def _errors(option: InputOption, parts: list[SeenBatch], decoder: Decoder) -> list[torch.Tensor]:
    """Rounded input - input, float32 [tokens, columns] each. A stored scale reaches all of them."""
    assert option.scale is not None
    args, scale = input_args(option.name, option.scale), None
    if input_format(option.name).stored(option.scale):
        low, high = torch.stack([torch.stack(torch.aminmax(part.inputs)) for part in parts]).unbind(1)
        scale = static_scale(low.min(), high.max(), args, decoder.scale_dtype)
    hook = RoundedInputs(args, InputSwitch(), scale)
    # Without a dimension of rows, "per token" would be per tensor there.
    return [hook.rounded(part.inputs[None])[0].float() - part.inputs.float() for part in parts]
