"""Modules are as they were once a context is left, and compute as transformers would inside it."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import nn

from sinkquant.models import Decoder, Walk
from sinkquant.models.hooks import compute_in, computing, evaluating, learning


def test_another_librarys_forward_is_put_back() -> None:
    """accelerate, say, leaves a forward of its own on every module that it places."""
    layer = nn.Linear(2, 2)
    mine, other = (lambda _: "mine"), (lambda _: "other")
    layer.forward = mine
    with computing([(layer, other), (layer, lambda _: "a third")]):
        assert layer(torch.ones(2)) == "a third"
    assert layer.forward is mine


def test_a_module_without_one_keeps_its_class_forward() -> None:
    model = tiny_model("llama")
    walk = Walk(Decoder.of(model), torch.arange(32)[None], 1)
    for step in walk.steps():
        step.run()
    walk.losses()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_of_rotary_embeddings_are_not_rounded(dtype: torch.dtype) -> None:
    """transformers keeps them in float32 whatever it loads: rounded, a position of some hundreds is off by radians."""
    model = tiny_model("llama")
    angles = model.model.rotary_emb.inv_freq.clone()
    with compute_in([model], "cpu", dtype):
        assert torch.equal(model.model.rotary_emb.inv_freq, angles)
        assert model.model.norm.weight.dtype == dtype
        model(torch.arange(16)[None])
    assert model.model.norm.weight.dtype == torch.float32


def test_modules_and_gradients_are_the_callers_again() -> None:
    """A frozen layer in evaluation mode inside a model in training, and gradients that are being gathered."""
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    weight = model.model.norm.weight
    weight.grad = torch.ones_like(weight)
    with evaluating(model), learning(model, [weight]):
        assert weight.grad is None
        assert not any(module.training for module in model.modules())
        model(torch.arange(16)[None]).logits.sum().backward()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(weight.grad, torch.ones_like(weight))
