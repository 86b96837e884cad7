"""Memory that the allocator keeps."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what was freed below its newest allocation, which adds up to
    hundreds of megabytes over the blocks of a walk. Elsewhere nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
