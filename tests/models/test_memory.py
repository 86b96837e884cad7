"""Large blocks of memory lie apart, so that they are given back as soon as they are freed."""

from __future__ import annotations

import ctypes
import sys

import torch

from sinkquant.models.memory import map_large


def mapped() -> int:
    """Bytes that glibc has mapped apart from its heaps."""
    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    return int(mallinfo().hblkhd)


def test_a_tensor_is_mapped_after_a_larger_one_was_freed() -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        map_large()  # does nothing, and says so by returning
        return
    torch.empty(24 << 20, dtype=torch.uint8)  # raises glibc's own bound to its size
    map_large()
    before = mapped()
    kept = torch.empty(8 << 20, dtype=torch.uint8)
    assert mapped() - before >= kept.numel()
    del kept
    assert mapped() <= before
