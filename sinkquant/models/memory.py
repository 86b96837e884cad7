"""Memory that the allocator keeps."""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 22
"""Bytes from which on a block of memory is a mapping of its own."""
M_MMAP_THRESHOLD = -3
"""The number that glibc's `mallopt` knows the setting by."""


def map_large() -> None:
    """Let glibc map every large block by itself from now on, so that a tensor's memory goes back to the system as soon
    as the tensor goes. Left alone, glibc raises the bound to 32 MB at the first such block that is freed, and what lies
    under it is kept: 600 MB over a walk through Llama-3.2-1B's shape. Elsewhere nothing is done."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what was freed below its newest allocation, which adds up to
    hundreds of megabytes over the blocks of a walk. Elsewhere nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
