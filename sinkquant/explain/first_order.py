"""The part of every parameter in the loss, to first order, along the straight way from the unquantized weights to the
quantized ones: integrated gradients (Sundararajan et al. 1703.01365), whose parts add up to the whole KL.

A gradient at the quantized weights alone says little of a model that has collapsed: its predictions no longer answer to
small changes. Two nodes of Gauss and Legendre are exact where the loss is a polynomial of degree four on the way; the
weights of one module are told apart by the middle of the way alone, which is exact to degree two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sinkquant.explain.parts import Part, put_back
from sinkquant.explain.probe import Probe
from sinkquant.models.hooks import hooked, learning
from sinkquant.models.inputs import inputs_left_alone

NODES = ((0.5 - 12 ** -0.5, 0.5), (0.5 + 12 ** -0.5, 0.5))
MIDDLE = ((0.5, 1.0),)


def first_order(probe: Probe, model: PreTrainedModel, parts: Sequence[Part],
                nodes: Sequence[tuple[float, float]] = NODES,
                in_full: bool = False) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """By parameter name: its part of the mean KL, nats per token; and, where asked, that of every single weight.

    Inputs that the checkpoint rounds are not rounded here, and its cache is not packed.

    Args:
        nodes: places on the way, as a share of it, with their weights. in_full: tell every weight apart.
    """
    whole = {part.name: 0.0 for part in parts}
    single = {part.name: torch.zeros_like(part.quantized) for part in parts if in_full}
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

    with (learning(model, [part.parameter for part in parts]), hooked(watch(part) for part in parts),
          inputs_left_alone(model)):
        for share, weight in nodes:
            scale[0] = weight / probe.rows.numel()
            blended = {part.name: torch.lerp(part.unquantized, part.quantized, share) for part in parts}
            with put_back(parts, blended):
                _pull(probe, model)
    return whole, single


def _pull(probe: Probe, model: PreTrainedModel) -> None:
    """The gradient of the sum of KL over all tokens, a row at a time."""
    for place, row in enumerate(probe.rows.split(1)):
        p = probe.predicted(place)
        with torch.enable_grad():
            logits = model(row.to(model.device), use_cache=False).logits[0].float()
            q = torch.log_softmax(logits, dim=-1)
            (p.to(q.device).exp() * (p.to(q.device) - q)).sum().backward()
