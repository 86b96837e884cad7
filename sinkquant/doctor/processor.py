"""Which of the instructions that engines' kernels need this processor has."""

from __future__ import annotations

import torch


def instructions() -> frozenset[str]:
    """As `Loads.instructions` names them."""
    has = {"AVX-512": torch.cpu._is_avx512_supported(), "VNNI": torch.cpu._is_vnni_supported()}
    return frozenset(name for name, there in has.items() if there)
