"""What the caller has set of torch for work of their own, left out of ours for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_numerics() -> Iterator[None]:
    """Compute as a fresh process does while the context is open, or the function that it decorates runs: new tensors
    are float32, nothing is cast by autocast, and gradients are had where they are asked for, whatever default dtype,
    `torch.autocast` or `torch.inference_mode` the caller is in."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
