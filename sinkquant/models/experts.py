"""Fused experts: a parameter of three dimensions that holds one projection of all experts of a layer.

On disk most families keep one tensor per expert, and transformers stacks them while it loads. What a fused parameter
is made of, and under which names, is read from transformers' own conversion of that family, so that a checkpoint with
packed experts is one that plain transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

EXPERTS = re.compile(r"(^|\.)experts\.\w+$")
EXPERTS_REASON = ("fused experts: plain transformers loads packed ones only of families whose checkpoints hold a gate, "
                  "an up and a down projection without biases for every expert")


@dataclass(frozen=True)
class ExpertLinear:
    """One projection of one expert, under the name that it has in a checkpoint.

    Attributes:
        owner: module name of the layer's experts. module: that module. leaf: its parameter that holds the projection.
        index: the expert. start, rows: where in the expert's slice the projection lies.
        role: "up" for what reads the layer's hidden states (gate and up projections), "down" for what reads theirs.
    """

    owner: str
    module: nn.Module
    leaf: str
    index: int
    start: int
    rows: int
    role: str

    @property
    def parameter(self) -> str:
        """The name of the fused parameter."""
        return f"{self.owner}.{self.leaf}"

    @property
    def weight(self) -> torch.Tensor:
        """[rows, columns], a view of the fused parameter as it is now."""
        fused = getattr(self.module, self.leaf).data
        assert isinstance(fused, torch.Tensor)
        return fused[self.index, self.start:self.start + self.rows]


def fused_parameters(model: PreTrainedModel, blocks: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Name -> parameter, [experts, ...], of every fused parameter inside the blocks, or inside the model."""
    prefixes = tuple(f"{block}." for block in blocks) or ""
    return {name: parameter for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and EXPERTS.search(name) and name.startswith(prefixes)}


def fused_by_owner(model: PreTrainedModel, blocks: tuple[str, ...] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Module name of a layer's experts -> its fused parameters, by their names."""
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in fused_parameters(model, blocks).items():
        owners.setdefault(name.rpartition(".")[0], {})[name] = parameter
    return owners


def expert_linears(model: PreTrainedModel, blocks: tuple[str, ...] = ()) -> dict[str, ExpertLinear]:
    """Name -> linear for every expert that can be packed, inside the blocks or inside the model: layer by layer, expert
    by expert, what reads the hidden states first. A layer's experts are all here or none of them."""
    owners = fused_by_owner(model, blocks)
    if not owners:
        return {}
    names = LoadedNames(model)
    found: dict[str, ExpertLinear] = {}
    for owner, fused in owners.items():
        module = model.get_submodule(owner)
        parts = {name: names.parts(name) for name in fused}
        if _walks_plainly(module) and all(parts.values()):
            for index in range(len(next(iter(fused.values())))):
                for name in sorted(fused, key=lambda name: "down" in name.rpartition(".")[2]):
                    leaf = name.rpartition(".")[2]
                    rows = fused[name].shape[1] // len(parts[name])
                    for place, part in enumerate(parts[name]):
                        found[part.replace("*", str(index))] = ExpertLinear(
                            owner, module, leaf, index, place * rows, rows, "down" if "down" in leaf else "up")
    return found


def not_loaded_from(model: PreTrainedModel, blocks: tuple[str, ...]) -> list[str]:
    """The quantization formats for which transformers loads a checkpoint into other experts than the model has; and
    "vllm" where the hub, and vLLM with it, has other names for tensors of the text model than transformers. How the
    text model itself is called does not count: vLLM knows both."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry.reverse_transform() for entry in mapping[::-1] if isinstance(entry, WeightRenaming)]
    text = blocks[0].rpartition(".")[0].rpartition(".")[0]
    head = model.get_output_embeddings()
    names = {name: name.removeprefix(f"{text}.") for name in model.state_dict() if name.startswith(f"{text}.")}
    names |= {f"{name}.": f"{name}." for name, module in model.named_modules() if module is head}
    renamed = any(not apply_renamings(name, renamings).endswith(tail) for name, tail in names.items())
    found = [MODULES_TO_PATCH_FOR_QUANTIZATION[type(module).__name__]["quantization_methods"]
             for module in model.modules() if type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION]
    return sorted({str(method.value) for methods in found for method in methods} | ({"vllm"} if renamed else set()))


def by_expert(parts: Mapping[str, ExpertLinear]) -> dict[tuple[str, int], list[str]]:
    """(module of the layer's experts, expert) -> the names of its projections, all in the order of `parts`."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, part in parts.items():
        found.setdefault((part.owner, part.index), []).append(name)
    return found


def cast_experts(model: PreTrainedModel) -> None:
    """Give fused experts the model's dtype: transformers leaves those that it unpacks as wide as their scales."""
    for parameter in fused_parameters(model).values():
        if parameter.dtype != model.dtype:
            parameter.data = parameter.data.to(model.dtype)


def handed_to_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, hidden_size] and chosen experts, int64 [tokens, experts per token], among the arguments
    that transformers calls a layer's experts with. `hands_over_choice` tells whether both are there."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    states = tensors[0].flatten(0, -2)
    routes = next(tensor for tensor in tensors if not tensor.is_floating_point())
    return states, routes.reshape(len(states), -1).long()


def shares_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """How much of what a chosen expert makes goes to the token, float [tokens, experts per token], among the arguments
    that transformers calls a layer's experts with."""
    _, chosen = handed_to_experts(args, kwargs)
    floats = [value for value in (*args, *kwargs.values())
              if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return floats[1].reshape(chosen.shape)


def hands_over_choice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer's experts are told which tokens are theirs, or have them in rows already (Llama 4)."""
    return any(isinstance(value, torch.Tensor) and not value.is_floating_point() for value in (*args, *kwargs.values()))


def those_chosen(chosen: torch.Tensor, count: int) -> list[int]:
    """The experts that any token goes to, ascending; transformers gives slots that nobody fills the number `count`."""
    return [index for index in chosen.unique().tolist() if index < count]


def read_by_expert(module: nn.Module, index: int, states: torch.Tensor) -> torch.Tensor:
    """What an expert's down projection reads, from the hidden states of the tokens that go to it."""
    fused: Any = module
    read = fused._apply_gate(F.linear(states, fused.gate_up_proj[index]))
    assert isinstance(read, torch.Tensor)
    return read


def made_by(converter: WeightConverter, name: str) -> bool:
    """Whether it is what transformers makes a parameter with."""
    return name.endswith(_literal(converter._original_target_patterns[0]))


def _walks_plainly(module: nn.Module) -> bool:
    """Whether an expert is down(gate(up_and_gate(x))) of weights stored [out, in], without biases: then what it
    reads can be computed from the layer's hidden states, whichever implementation runs the layer."""
    leaves = {name for name, _ in module.named_parameters()}
    return (leaves == {"gate_up_proj", "down_proj"} and bool(getattr(module, "has_gate", False))
            and not getattr(module, "has_bias", True) and not getattr(module, "is_transposed", True))


class LoadedNames:
    """How transformers' loader renames what it reads, and the tensors that a fused parameter is stacked from."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.prefix, self.state = model.base_model_prefix, model.state_dict()

    def parts(self, name: str) -> list[str]:
        """Module names, with "*" for the expert, of the matrices whose rows follow one another in an expert's slice;
        empty where the parameter is not stacked from such."""
        for converter in self.converters:
            sources = [_literal(source) for source in converter._original_source_patterns]
            target = _literal(converter._original_target_patterns[0])
            if made_by(converter, name) and _stacks(converter) and all(s.endswith(".weight") for s in sources):
                parts = [name.removesuffix(target) + source.removesuffix(".weight") for source in sources]
                if all(self.becomes(f"{part.replace('*', '0')}.weight") == name for part in parts):
                    return parts
        return []

    def becomes(self, key: str) -> str:
        """What a tensor on disk is loaded into, if the model has it."""
        return rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)[0]


def _stacks(converter: WeightConverter) -> bool:
    """Whether it stacks one tensor per expert, or several after they were joined by rows."""
    merge, *rest = converter.operations
    joins = [isinstance(step, Concatenate) and step.dim == 1 for step in rest]
    return (isinstance(merge, MergeModulelist) and merge.dim == 0
            and joins == [True] * (len(converter._original_source_patterns) > 1))


def _literal(pattern: str) -> str:
    return pattern.replace("\\", "")
