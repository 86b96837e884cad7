"""What a quantized model remembers, so that it can be saved as packed bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from sinkquant.artifacts import Plan
from sinkquant.cache import Bases, Prefix
from sinkquant.errors import RequestError
from sinkquant.schemes.codecs import PackedWeight, StoredWeight

ATTRIBUTE = "sinkquant_state"
UNPACKED = "sinkquant_unpacked"
"""Marks a model whose dense weights came out of a quantized checkpoint, or which `quantize` has begun to change."""


@dataclass
class QuantizedState:
    """The plan that was carried out, the packed weights (those of the token embedding and the output head in `ends`),
    the relative error that every module was left with (before the whole model was tuned, where it was), and the stored
    scales, [1], of inputs that have one; and the calibration tokens that went to every one of a layer's experts; and
    what the KV cache rotates by, where it has to be found, and the keys and values of its prefix; and the scales of a
    KV cache in FP8, by tensor name.
    """

    plan: Plan
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    ends: dict[str, PackedWeight] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    bases: Bases | None = None
    prefix: Prefix | None = None
    kv_scales: dict[str, torch.Tensor] = field(default_factory=dict)


def state_of(model: nn.Module) -> QuantizedState:
    """The state of a model that `quantize` has worked on.

    Raises:
        RequestError: it has not.
    """
    state = getattr(model, ATTRIBUTE, None)
    if not isinstance(state, QuantizedState):
        raise RequestError("this model was not quantized by sinkquant; call sinkquant.quantize(model, plan) first.")
    return state


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights went through any quantization: by `quantize`, or before they were loaded."""
    config = getattr(model, "config", None)
    return (getattr(model, ATTRIBUTE, None) is not None or getattr(model, UNPACKED, False)
            or getattr(config, "quantization_config", None) is not None)
