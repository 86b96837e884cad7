"""The contract of a codec: weights of one number format -> the tensors of its files, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from sinkquant.schemes import Scheme, WeightFormat
from sinkquant.schemes.codecs.files import Files
from sinkquant.schemes.codecs.grid import Grid, IntegerGrid, Nearest
from sinkquant.schemes.codecs.packed import PackedWeight

Leaves = dict[str, torch.Tensor]
"""The tensors of a linear, by what follows the module's name on disk."""


@dataclass(frozen=True)
class LibraryWeight:
    """A weight that a library has rounded by itself, as it stores it. `shape`: of the dense one."""

    codec: Codec
    form: WeightFormat
    leaves: Leaves
    shape: tuple[int, ...]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What it stands for, [rows, columns]."""
        return self.codec.decode(self.leaves, self.form, self.shape, dtype)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        leaves = {name: leaf.to(device) for name, leaf in self.leaves.items()}
        return type(self)(self.codec, self.form, leaves, self.shape)


StoredWeight = PackedWeight | LibraryWeight
"""Codes that one of our methods chose, or a library's."""


@dataclass(frozen=True)
class Codec(ABC):
    """One number format. `files`: whose checkpoints hold it."""

    scheme: Scheme
    files: Files

    @abstractmethod
    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """The tensors that a quantized linear becomes; those that `Scheme.tensors` announces.

        Args:
            input_scale: the stored scale of its inputs, [1], where it has one.
        """

    @abstractmethod
    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the tensors stand for, [rows, columns] in `dtype`. shape: of the dense weight."""

    def nearest(self, form: WeightFormat, scale_dtype: torch.dtype, scale_search: bool,
                fused_scale: torch.Tensor | None = None) -> Nearest:
        """Rounding to nearest on the grid of this format; of schemes whose codes our methods choose.

        Args:
            scale_search: scales with the least squared error instead of those that reach the largest weight.
            fused_scale: what `fused_scale` gives, in schemes that have one.
        """
        return Nearest(self.grid(form, scale_dtype, fused_scale), scale_search)

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> Grid:
        """The numbers that a weight may take, of schemes whose codes our methods choose: integers, unless a format has
        others. Arguments as `nearest` has them."""
        return IntegerGrid(form.bits, scale_dtype, form.group_size or -1)

    def fused_scale(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The scale of a whole tensor that linears which engines fuse share, float32 [1]; of schemes with a
        `fused_scale`. weights: of all of them, float [rows, columns]."""
        raise NotImplementedError

    def module(self, leaves: Leaves, linear: nn.Linear) -> nn.Module:
        """The library's own module in place of a linear; of schemes with an `own_module`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LibraryCodec(Codec):
    """A format whose codes a library chooses."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, form: WeightFormat) -> Leaves:
        """Let the library round a weight, float [rows, columns]."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """As the library itself saves them."""
        assert isinstance(weight, LibraryWeight)
        return weight.leaves

    def rounded(self, weight: torch.Tensor, form: WeightFormat) -> LibraryWeight:
        """The weight, float [rows, columns], as the library rounds and stores it."""
        return LibraryWeight(self, form, self.encode(weight, form), tuple(weight.shape))


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
