"""Modules in the compute dtype on the compute device, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


@contextlib.contextmanager
def compute_in(modules: Sequence[nn.Module], device: str, dtype: torch.dtype) -> Iterator[None]:
    """Cast the floating-point parameters and buffers of modules while the context is open; what stays on disk is left
    there.

    Afterwards a tensor has its own dtype and device again: the very values it had, or, where somebody changed them in
    the meantime, those.
    """
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if not t.is_meta}
    # A cast to fewer bits cannot be undone: the values are kept.
    before = [(t, t.dtype, t.device, t.data if t.is_floating_point() and _loses(t.dtype, dtype) else None)
              for t in tensors.values()]
    try:
        for tensor, _, _, _ in before:
            tensor.data = tensor.data.to(device, dtype) if tensor.is_floating_point() else tensor.data.to(device)
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
