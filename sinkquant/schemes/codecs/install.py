"""Modules of a library in place of linears whose dense weight cannot show what they do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sinkquant.schemes.codecs.codec import LibraryWeight, StoredWeight


def install_modules(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    """Put a library's own module where it does more than multiply with the weight: LLM.int8() rounds its inputs.

    Args:
        weights: module name -> what was made of its weight.
    """
    for name, weight in weights.items():
        if isinstance(weight, LibraryWeight) and weight.codec.scheme.own_module:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, weight.codec.module(weight.leaves, linear))
