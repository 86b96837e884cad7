"""Weights in the number formats of other libraries, which round them themselves."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import nn

from sinkquant.errors import RequestError
from sinkquant.quantize.bitsandbytes import FourBit, LLMInt8
from sinkquant.quantize.gptq_words import GPTQWords
from sinkquant.quantize.quanto import Quanto
from sinkquant.schemes import WeightFormat, packages_of, scheme_of
from sinkquant.schemes.bitsandbytes import FourBit as FourBitScheme


class Reader(Protocol):
    """One number format, read."""

    def decode(self, leaves: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the tensors stand for, [rows, columns] in `dtype`."""


class Codec(Reader, Protocol):
    """One number format that a backend rounds to by itself."""

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [rows, columns] -> leaf name -> tensor."""


@dataclass(frozen=True)
class BackendWeight:
    """A weight as a backend stores it: `leaves` by the names that follow the module's on disk, `shape` of the dense
    one."""

    form: WeightFormat
    leaves: dict[str, torch.Tensor]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, weight: torch.Tensor, form: WeightFormat) -> Self:
        """Let the backend round a weight, float [rows, columns]."""
        return cls(form, _rounder(form).encode(weight), tuple(weight.shape))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What it stands for, [rows, columns]."""
        return codec(self.form).decode(self.leaves, self.shape, dtype)

    def cpu(self) -> Self:
        """The same in main memory."""
        return type(self)(self.form, {name: leaf.cpu() for name, leaf in self.leaves.items()}, self.shape)


def codec(form: WeightFormat) -> Reader:
    """The number format of a linear, compressed-tensors' own excepted."""
    return GPTQWords(form.bits) if form.storage == "gptq" else _rounder(form)


def _rounder(form: WeightFormat) -> Codec:
    """The number format of a linear whose codes the backend chooses."""
    if form.storage == "llm.int8":
        return LLMInt8()
    if form.storage.startswith("quanto"):
        return Quanto(form.bits, form.group_size or -1, form.storage == "quanto-float8")
    scheme = scheme_of(form)
    assert isinstance(scheme, FourBitScheme)
    return FourBit(scheme)


def rounds_itself(form: WeightFormat) -> bool:
    """Whether the backend of this format chooses the codes, and not one of our methods."""
    return scheme_of(form).rounds_itself


def require_packages(backend: str) -> None:
    """Refuse a backend whose library is not installed.

    Raises:
        RequestError: with the command that installs it.
    """
    for package, module in packages_of(backend).items():
        if not _installed(module):
            raise RequestError(f"the backend {backend} needs the package {package}, which is not installed; run "
                               "pip install 'sinkquant[backends]'.")


def install_modules(model: nn.Module, weights: dict[str, BackendWeight]) -> None:
    """Put a backend's own module where a dense weight cannot show what it does: LLM.int8() rounds its inputs."""
    for name, weight in weights.items():
        if weight.form.storage == "llm.int8":
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, LLMInt8().module(weight.leaves, linear))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
