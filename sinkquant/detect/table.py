"""What a survey of rows keeps of every layer: attention received by every position, value and output norms.

Bounded: one number per layer, head and token, never a length x length matrix.
"""

from __future__ import annotations

import torch

from sinkquant.models import AttentionRecord


class AttentionTable:
    """An observer of attention that remembers, for every layer, what each position of each row received.

    Attributes (lists over layers, rows in the order in which they were replayed, all on the CPU):
        received: [rows, heads, length] float32, column sums of the softmax.
        learned: [rows, heads] float32, mean mass in the learned sink column.
        visible: [length] number of queries that see a position; uniform: [length], `received` of even attention.
        value_norms: [rows, kv_heads, length] float32.
        output_norms: [heads] float64, sum over tokens of the norm of each head's output.
    """

    def __init__(self) -> None:
        self.received: list[torch.Tensor] = []
        self.learned: list[torch.Tensor] = []
        self.visible: list[torch.Tensor] = []
        self.uniform: list[torch.Tensor] = []
        self.value_norms: list[torch.Tensor] = []
        self.output_norms: list[torch.Tensor] = []
        self.has_learned_sink = False
        self._open: list[AttentionRecord] = []

    def attention(self, record: AttentionRecord) -> None:
        """Called by the walk for every batch; the caller closes a layer with `close_layer`."""
        self._open.append(record)

    def close_layer(self) -> None:
        """All batches of a layer were seen: keep what is needed and forget the rest."""
        records, self._open = self._open, []
        self.received.append(torch.cat([r.received for r in records]).cpu())
        self.learned.append(torch.cat([r.learned / r.query.shape[2] for r in records]).cpu())
        self.visible.append(records[0].visible.cpu())
        self.uniform.append(records[0].uniform.cpu())
        self.value_norms.append(torch.cat([r.value.float().norm(dim=-1) for r in records]).cpu())
        self.output_norms.append(torch.stack(
            [r.output.float().norm(dim=-1).double().sum(dim=(0, 2)) for r in records]).sum(0).cpu())
        self.has_learned_sink |= any(r.has_learned_sink for r in records)

    def sink_rate(self, threshold: float, position: int = 0) -> float:
        """Sink rate by Gu et al. (2410.10781, section 3): the share of samples, layers and heads in which the
        position's mean received attention, over the queries that see it, is over the threshold."""
        over = [(received[:, :, position] / visible[position].clamp(min=1) > threshold).float().mean()
                for received, visible in zip(self.received, self.visible, strict=True)]
        return float(torch.stack(over).mean())
