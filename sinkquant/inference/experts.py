"""A layer's experts, each projection a linear of its own, in place of transformers' fused tensors: whatever stands in
for a linear can stand in for a projection of an expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.models.experts import ExpertLinear


class SplitExpert(nn.Module):
    """down(gate(ups(x))): children are named as in a checkpoint.

    Args:
        ups: name -> linear of what reads the hidden states, in the order in which `gate` expects their outputs.
        down: name and linear of what reads `gate`'s output.
    """

    def __init__(self, ups: dict[str, nn.Module], down: tuple[str, nn.Module]) -> None:
        super().__init__()
        self.ups, self.down = tuple(ups), down[0]
        for name, module in (*ups.items(), down):
            self.add_module(name, module)

    def forward(self, states: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """states: [tokens, hidden_size] of the tokens that chose this expert. Returns the same shape."""
        read = gate(torch.cat([self.get_submodule(name)(states) for name in self.ups], -1))
        found: torch.Tensor = self.get_submodule(self.down)(read)
        return found


class SplitExperts(nn.ModuleList):
    """Stands in for the module that transformers calls a layer's experts, and is called as that is. Only experts that a
    token chose are computed.

    Args:
        gate: between the projections, [tokens, gate and up columns] -> [tokens, columns of the down projection].
    """

    def __init__(self, experts: Sequence[SplitExpert], gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(experts)
        self.gate = gate

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs, of the shape and dtype of `hidden_states`, with the
        numerics of transformers' own implementations: weighted and added in the wider of both dtypes.

        Args:
            hidden_states: [..., hidden_size]. top_k_index, top_k_weights: [tokens, experts per token].
        """
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = top_k_weights.flatten(0, -2)
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        chosen, counts = torch.unique_consecutive(experts, return_counts=True)
        given = states[order // weights.shape[1]].split(counts.tolist())
        outputs = [self[index](rows, self.gate) for index, rows in zip(chosen.tolist(), given, strict=True)]
        found = torch.empty(len(order), states.shape[-1], dtype=states.dtype, device=states.device)
        if outputs:
            found[order] = torch.cat(outputs)
        summed = (found.reshape(*weights.shape, states.shape[-1]) * weights[..., None]).sum(1)
        return summed.to(hidden_states.dtype).reshape(hidden_states.shape)


def split_experts(model: PreTrainedModel, parts: Mapping[str, ExpertLinear]) -> None:
    """Put linears in place of some layers' experts, with weights as empty as theirs are on the meta device.

    Args:
        parts: of `expert_linears`, all that belong to these layers.
    """
    owners: dict[str, dict[int, dict[str, nn.Module]]] = {}
    downs = {}
    for name, part in parts.items():
        fused = model.get_parameter(part.parameter)
        with torch.device("meta"):
            linear = nn.Linear(fused.shape[2], part.rows, bias=False, dtype=fused.dtype)
        leaf = name.rpartition(".")[2]
        owners.setdefault(part.owner, {}).setdefault(part.index, {})[leaf] = linear
        if part.role == "down":
            downs[part.owner] = leaf
    for owner, experts in owners.items():
        module: Any = model.get_submodule(owner)
        down = downs[owner]
        module._parameters.clear()  # its gate is all that is left of it
        model.set_submodule(owner, SplitExperts(
            [SplitExpert({leaf: linear for leaf, linear in linears.items() if leaf != down}, (down, linears[down]))
             for _, linears in sorted(experts.items())], module._apply_gate))
