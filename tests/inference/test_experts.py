"""Experts as linears: what transformers' own implementations compute, and only for the experts that were chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_mixture
from torch import nn
from transformers import PreTrainedModel

from sinkquant.inference.experts import SplitExperts, split_experts
from sinkquant.models.experts import expert_linears


def split(model: PreTrainedModel) -> list[SplitExperts]:
    """Split a model's experts and give them the weights that they had."""
    parts = expert_linears(model)
    weights = {name: part.weight.clone() for name, part in parts.items()}
    split_experts(model, parts)
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return [module for module in model.modules() if isinstance(module, SplitExperts)]


def given(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts and their weights; nobody chooses the experts 5 and 6."""
    draw = torch.Generator().manual_seed(tokens)
    choices = torch.stack([torch.randperm(5, generator=draw)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 64, generator=draw).bfloat16(), choices, torch.rand(tokens, 2, generator=draw).to(dtype)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_numbers_of_transformers_implementations(family: str, dtype: torch.dtype) -> None:
    model = tiny_mixture(family, dtype=torch.bfloat16)
    owners = dict.fromkeys(part.owner for part in expert_linears(model).values())
    fused: list[Any] = [model.get_submodule(owner) for owner in owners]
    cases = [given(tokens, dtype) for tokens in (1, 7, 300)]
    expected = []
    with torch.no_grad():
        for module in fused:
            for implementation in ("eager", "batched_mm", "grouped_mm"):
                module.config._experts_implementation = implementation
                expected.append([module(*case) for case in cases])
        found = [[module(*case) for case in cases] for module in split(model) for _ in range(3)]
    assert len(found) == len(expected) == 3 * len(owners)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert (a.float() - b.float()).norm() < 0.005 * b.float().norm()


def test_only_chosen_experts_are_computed() -> None:
    module = split(tiny_mixture("qwen3_moe", dtype=torch.bfloat16))[0]
    computed: dict[int, int] = {}
    for index, expert in enumerate(module):
        expert.register_forward_pre_hook(
            lambda _, inputs, index=index: computed.update({index: len(inputs[0])}))
    states, choices, weights = given(7)
    with torch.no_grad():
        module(states, choices, weights)
    assert computed == {index: int((choices == index).sum()) for index in range(5)}
    with torch.no_grad():
        assert module(states[:0], choices[:0], weights[:0]).shape == (0, 64)


def test_only_the_layers_that_are_named_are_split() -> None:
    model = tiny_mixture("qwen3_moe")
    split_experts(model, {name: part for name, part in expert_linears(model).items() if ".layers.1." in name})
    assert [name for name, parameter in model.named_parameters() if parameter.dim() == 3] == [
        f"model.layers.0.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")]
    linear = model.get_submodule("model.layers.1.mlp.experts.15.down_proj")
    assert isinstance(linear, nn.Linear)
    assert linear.weight.is_meta
    assert linear.weight.shape == (64, 32)
