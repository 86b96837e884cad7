"""Norms and experts in the dtype that they are given; transformers takes norms in float32 in any model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel


def jolt(model: PreTrainedModel, size: float = 0.5) -> PreTrainedModel:
    """Random gains and biases, which a model from configuration alone does not have. In place; returns the model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = size * (2 * torch.rand(parameter.shape, generator=generator) - 1)
            parameter.data += noise.to(parameter.dtype)
    return model


def exact_norms(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let RMS norms of the model's classes compute in their input's dtype, by their definition."""
    for kind in {type(module) for module in model.modules() if "RMSNorm" in type(module).__name__}:
        offset = 1 if "Gemma" in kind.__name__ else 0

        def forward(self: torch.nn.Module, x: torch.Tensor, offset: int = offset) -> torch.Tensor:
            eps = getattr(self, "eps", None) or self.variance_epsilon
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + self.weight)

        monkeypatch.setattr(kind, "forward", forward)
    model.config._experts_implementation = "eager"
