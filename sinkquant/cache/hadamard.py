"""The normalised Hadamard rotation of a head, which is its own inverse (QuaRot 2404.00456, section 4).

It spreads an outlier channel over the whole head before packing. Attention is unchanged where the query is rotated
with the keys, and the output with the values.
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] times the Hadamard matrix over sqrt(D), in float32, for D a power of two; returned in x's dtype."""
    width = x.shape[-1]
    y = x.float()
    half = 1
    while half < width:
        pairs = y.unflatten(-1, (width // (2 * half), 2, half))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return (y * width**-0.5).to(x.dtype)


def is_power_of_two(width: int) -> bool:
    """Whether a head of this width can be rotated."""
    return width > 0 and width & (width - 1) == 0
