"""Attention over rows that came in one pass, each query seeing what it would have seen had they come in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.artifacts.kv import KVCachePlan, packed_tokens


def chunk_length(plan: KVCachePlan) -> int:
    """Tokens per chunk: no more than the window, so that nothing is seen exactly that decoding would have seen packed,
    and one block at most, so that a plan and its control with a longer window are read alike."""
    return max(1, min(plan.group_size, plan.window))


class ReadInChunks(Exception):
    """A model does something else with keys or values than attend, so that its rows have to come in chunks."""


@dataclass(frozen=True)
class ChunkedRead:
    """What stands in for keys and values on their way to the attention function.

    A block's codes depend on nothing but its own keys and values, and these on earlier columns only: so all of them are
    known in one pass, and a chunk's queries take the columns that were packed before the chunk from the packed states.

    Attributes:
        keys, values: [batch, kv_heads, length, head_dim] as they came; packed_keys, packed_values: as they are read
            once everything that leaves the window is packed, exact tokens in their place.
    """

    plan: KVCachePlan
    keys: torch.Tensor
    values: torch.Tensor
    packed_keys: torch.Tensor
    packed_values: torch.Tensor

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """There are none that all chunks see.

        Raises:
            ReadInChunks: always.
        """
        raise ReadInChunks

    def attend(self, own: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], module: nn.Module,
               query: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """The model's own attention, chunk by chunk.

        Args:
            own: transformers' attention function. query: [batch, heads, length, head_dim].
            mask: [batch or 1, 1 or heads, length, length], bool or to be added; None for causal.

        Returns:
            [batch, length, heads, head_dim], None.
        """
        length, step = query.shape[2], chunk_length(self.plan)
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
        found = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            split = packed_tokens(start, self.plan.window, self.plan.group_size)
            keys, values = (torch.cat([packed[:, :, :split], plain[:, :, split:stop]], dim=2) for packed, plain in
                            ((self.packed_keys, self.keys), (self.packed_values, self.values)))
            found.append(own(module, query[:, :, start:stop], keys, values, mask[:, :, start:stop, :stop], **kwargs)[0])
        return torch.cat(found, dim=1), None
