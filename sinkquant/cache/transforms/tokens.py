"""Tokens scaled by their norm before they are grouped (OScaR 2605.19660).

Keys share one range per channel and block of tokens. A token whose key is much longer than the others' widens it for
all of them, one much shorter is lost in it. Keys of unit length share a range well; the length is stored beside the
codes.
"""

from __future__ import annotations

import torch

HALF = torch.finfo(torch.float16)


def unit_tokens(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [..., G, D] -> (float32 states of unit length, float16 lengths [..., G, 1]).

    A state is divided by its length as it is stored, so that rounding the length adds no error.
    """
    values = states.float()
    norms = values.norm(dim=-1, keepdim=True).clamp(HALF.tiny, HALF.max).half()
    return values / norms.float(), norms
