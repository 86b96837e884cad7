"""A model family that sinkquant has never heard of: attention and a two-layer MLP side by side, behind one norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm


class ToyConfig(LlamaConfig):
    """The sizes of a Llama."""

    model_type = "toy_parallel"


class ToyMLP(nn.Module):
    """Two linears with a ReLU between them."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = nn.ReLU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class ToyBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = ToyMLP(config)

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **given)
        return hidden_states + attended + self.mlp(normed)


class ToyModel(LlamaModel):
    """A Llama with other blocks."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ToyBlock(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class ToyForCausalLM(LlamaForCausalLM):
    """The model with its head."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()


AutoConfig.register("toy_parallel", ToyConfig, exist_ok=True)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
