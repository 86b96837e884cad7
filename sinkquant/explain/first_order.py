"""The part of every parameter in the loss, to first order, along the straight way from the unquantized weights to the
quantized ones: integrated gradients (Sundararajan et al. 1703.01365), whose parts add up to the whole KL.

A gradient at the quantized weights alone says little of a model that has collapsed: its predictions no longer answer to
small changes. Three nodes of Gauss and Legendre are exact where the loss is a polynomial of degree six on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sinkquant.explain.parts import Part, put_back
from sinkquant.explain.probe import Probe
from sinkquant.models.head import OutputHead
from sinkquant.models.inputs import inputs_left_alone

NODES = ((0.5 - 0.15 ** 0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15 ** 0.5, 5 / 18))


def first_order(probe: Probe, model: PreTrainedModel, parts: Sequence[Part],
                in_full: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """By parameter name: its part of the mean KL, nats per token; and of some, that of every single weight.

    Inputs that the checkpoint rounds are not rounded here, and its cache is not packed.

    Args:
        in_full: names whose weights are told apart.
    """
    whole = {part.name: 0.0 for part in parts}
    single = {part.name: torch.zeros_like(part.quantized) for part in parts if part.name in in_full}
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(part.parameter) for part in parts}
    for parameter, _ in asked:
        parameter.requires_grad_(id(parameter) in wanted)
    scale = [0.0]

    def watch(part: Part) -> torch.utils.hooks.RemovableHandle:
        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            product = parameter.grad * (part.quantized - part.unquantized) * scale[0]
            whole[part.name] += float(product.double().sum())
            if part.name in single:
                single[part.name] += product
            parameter.grad = None

        return part.parameter.register_post_accumulate_grad_hook(take)

    handles = [watch(part) for part in parts]
    try:
        with inputs_left_alone(model):
            for share, weight in NODES:
                scale[0] = weight / probe.rows.numel()
                blended = {part.name: torch.lerp(part.unquantized, part.quantized, share) for part in parts}
                with put_back(parts, blended):
                    _pull(probe, model)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in asked:
            parameter.requires_grad_(before)
            parameter.grad = None
    return whole, single


def _pull(probe: Probe, model: PreTrainedModel) -> None:
    """The gradient of the sum of KL over all tokens, a row at a time."""
    head = OutputHead(probe.original)
    for row, states in zip(probe.rows.split(1), probe.states.split(1), strict=True):
        p = torch.log_softmax(head.logits(states[0]), dim=-1)
        with torch.enable_grad():
            logits = model(row.to(model.device), use_cache=False).logits[0].float()
            q = torch.log_softmax(logits, dim=-1)
            (p.to(q.device).exp() * (p.to(q.device) - q)).sum().backward()
