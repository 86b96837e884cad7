"""What is done to modules for a while: hooks, other forward passes, another dtype. A single handle of torch is such a
context itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks away when the context is left."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextlib.contextmanager
def computing(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules compute something else than their own forward pass until the context is left."""
    replaced = []
    try:
        for module, forward in forwards:
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, before in reversed(replaced):
            module.__dict__.pop("forward", None)
            if before is not None:  # another library's, such as accelerate's
                module.forward = before


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout while the context is open."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def learning(model: nn.Module, parameters: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Let these parameters of a model, and no others, take gradients while the context is open; afterwards each
    has those of before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.grad = gradient
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def compute_in(modules: Sequence[nn.Module], device: str, dtype: torch.dtype) -> Iterator[None]:
    """Cast the floating-point parameters and buffers of modules while the context is open; what stays on disk is left
    there, and the frequencies of rotary embeddings in the dtype that they have, as transformers loads them.

    Afterwards a tensor has its own dtype and device again: the very values it had, or, where somebody changed them in
    the meantime, those.
    """
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if not t.is_meta}
    angles = {id(t) for module in modules for name, t in module.named_buffers() if name.endswith("inv_freq")}
    # A cast to fewer bits cannot be undone: the values are kept.
    before = [(t, t.dtype, t.device, t.data if t.is_floating_point() and _loses(t.dtype, dtype) else None)
              for t in tensors.values()]
    try:
        for tensor, _, _, _ in before:
            cast = tensor.is_floating_point() and id(tensor) not in angles
            tensor.data = tensor.data.to(device, dtype) if cast else tensor.data.to(device)
        yield
    finally:
        for tensor, old_dtype, old_device, original in before:
            if original is not None and torch.equal(tensor.data, original.to(device, dtype)):
                tensor.data = original
            else:
                tensor.data = tensor.data.to(old_device, old_dtype)


def _loses(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a cast may change values: anything but to the same dtype or to float32 from fewer bits."""
    return old != new and not (new in (torch.float32, torch.float64) and old.itemsize <= new.itemsize)
