"""Weights in large pages of memory: a step of decoding reads every weight once, and with pages of 4 KB a part of its
time is spent on finding them."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import nn

from sinkquant.models.memory import give_back

PAGE = 1 << 21
"""Bytes of a large page on x86-64, and on Arm where small pages have 4 KB."""
PART = 1 << 26
"""Bytes of a mapping, unless a tensor needs more. It goes back to the system with the last of its tensors, so that what
is offloaded later does free memory."""
START = 64
"""Every tensor begins at a multiple of so many bytes, as torch's allocator has it."""


class LargePages:
    """Where tensors are copied to: anonymous mappings for which the system is asked for large pages (`madvise`)."""

    def __init__(self) -> None:
        self.part: mmap.mmap | None = None
        self.used = self.end = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a CPU tensor; what it lies in lives as long as it does."""
        if self.part is None or self.used + tensor.nbytes > self.end:
            self._add(max(PART, tensor.nbytes))
        assert self.part is not None
        found = torch.frombuffer(self.part, dtype=torch.uint8, count=tensor.nbytes, offset=self.used)
        self.used += -(-tensor.nbytes // START) * START
        return found.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _add(self, size: int) -> None:
        """A mapping whose first byte that is used begins a page."""
        self.part = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system that is built without large pages
            self.part.madvise(mmap.MADV_HUGEPAGE)
        self.used = -torch.frombuffer(self.part, dtype=torch.uint8).data_ptr() % PAGE
        self.end = self.used + size


@torch.no_grad()
def to_large_pages(model: nn.Module) -> None:
    """Copy the parameters and buffers of a model that lie in main memory into large pages, one after the other, in
    place; tied ones stay tied. No view of a mapped file is left then, whose pages would all count as this process's
    memory. Where Python does not know how to ask for large pages (outside Linux), or the system gives none, the copies
    lie in ordinary ones."""
    copy = LargePages().copy if hasattr(mmap, "MADV_HUGEPAGE") else torch.clone
    owners: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type == "cpu" and tensor.nbytes:
                owners.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(
                    (module, name))
    freed = 0
    for places in owners.values():
        module, name = places[0]
        moved = copy(getattr(module, name).data)
        freed += moved.nbytes
        for module, name in places:
            if name in module._buffers:
                module._buffers[name] = moved
            else:
                module.get_parameter(name).data = moved
        if freed > PART:  # small tensors would be in memory twice until the end
            give_back()
            freed = 0
