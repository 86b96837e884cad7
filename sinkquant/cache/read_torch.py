"""Reads one lane of packed blocks with torch: scores of queries with keys, and weighted sums of values.

The scale of every channel and block is folded into the query, so that keys are read as bare codes (KIVI 2402.02750,
section 3.3, does it in CUDA); zeros enter as one product of query and zero per block. Values are scaled in chunks that
stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.cache.packing import unpack
from sinkquant.cache.store import CHUNK_VALUES, Lane


class TorchReads:
    """Of any bits, 16 too, on any device. Lengths and rotations are the caller's."""

    def scores(self, lane: Lane, block: int, queries: torch.Tensor) -> torch.Tensor:
        """float32 [batch, heads, rows, blocks * block] of queries float32 [batch, heads, rows, D]."""
        assert lane.data is not None
        batch, heads, rows, width = queries.shape
        # Blocks before rows: every block multiplies a query of its own, into which its scales are folded.
        scores = queries.new_empty(batch, heads, lane.data.shape[2], rows, block)
        for part, codes, scale in _chunks(lane, block):
            mine = (queries[:, :, None] * scale if scale is not None else
                    queries[:, :, None].expand(-1, -1, codes.shape[2], -1, -1))
            scores[:, :, part] = torch.bmm(mine.reshape(-1, rows, width), codes.flatten(0, 2).mT).view(
                batch, heads, codes.shape[2], rows, block)
        if lane.scale is not None:
            scores += (queries @ lane.starts().squeeze(3).mT).transpose(2, 3)[..., None]
        return scores.transpose(2, 3).flatten(3)

    def sums(self, lane: Lane, block: int, weights: torch.Tensor) -> torch.Tensor:
        """float32 [batch, heads, rows, D] of weights float32 [batch, heads, rows, blocks * block]."""
        assert lane.data is not None
        out = weights.new_zeros(*weights.shape[:3], lane.data.shape[4])
        for part, codes, scale in _chunks(lane, block):
            if scale is not None:
                codes.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None])
            here = weights[:, :, :, part.start * block:part.stop * block]
            out += here @ codes.flatten(2, 3)
        if lane.scale is not None:
            zeros = weights @ lane.starts().flatten(2, 3)
            out.unflatten(-1, (zeros.shape[-1], -1)).add_(zeros[..., None])
        return out


def _chunks(lane: Lane, block: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Blocks in chunks: (which, codes float32 [batch, heads, blocks, G, D], scale); without a scale the codes are the
    values."""
    assert lane.data is not None
    batch, heads, blocks, _, width = lane.data.shape
    size = max(1, CHUNK_VALUES // (batch * heads * block * width))
    for start in range(0, blocks, size):
        part = slice(start, min(start + size, blocks))
        data = lane.data[:, :, part]
        if lane.scale is None:
            yield part, data.float(), None
        else:
            yield part, unpack(data, lane.bits, torch.float32), lane.steps(part)
