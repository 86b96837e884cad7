"""What a survey of rows keeps of every layer: attention received by every position, value and output norms.

Bounded: one number per layer, head and token, never a length x length matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sinkquant.errors import RequestError
from sinkquant.models import AttentionRecord, Walk


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention gave, all on the CPU; of one batch of rows until the layer is closed.

    Attributes:
        received: [rows, heads, length] float32, column sums of the softmax.
        learned: [rows, heads] float32, mean mass in the learned sink column.
        visible: [length] number of queries that see a position; uniform: [length], `received` of even attention.
        value_norms: [rows, kv_heads, length] float32.
        output_norms: [heads] float64, sum over tokens of the norm of each head's output.
    """

    received: torch.Tensor
    learned: torch.Tensor
    visible: torch.Tensor
    uniform: torch.Tensor
    value_norms: torch.Tensor
    output_norms: torch.Tensor

    @property
    def mass(self) -> torch.Tensor:
        """[rows, heads, length], mean attention that a position receives from the queries that see it."""
        return self.received / self.visible.clamp(min=1)


class AttentionTable:
    """An observer of attention that remembers, for every layer, what each position of each row received. Rows are in
    the order in which they were replayed. A layer without an attention matrix, as hybrids have them, has no heads here.
    """

    def __init__(self) -> None:
        self.layers: list[LayerAttention] = []
        self.has_learned_sink = False
        self._open: list[LayerAttention] = []

    def attention(self, record: AttentionRecord) -> None:
        """Called by the walk for every batch; the caller closes a layer with `close_layer`."""
        self.has_learned_sink |= record.has_learned_sink
        self._open.append(LayerAttention(
            received=record.received.cpu(), learned=(record.learned / record.query.shape[2]).cpu(),
            visible=record.visible.cpu(), uniform=record.uniform.cpu(),
            value_norms=record.value.float().norm(dim=-1).cpu(),
            output_norms=record.output.float().norm(dim=-1).double().sum(dim=(0, 2)).cpu()))

    def require_causal(self, rows: int, architecture: str) -> None:
        """Refuse a layer that is open and did not compute causal attention exactly once for every one of `rows` rows.
        """
        if sum(len(batch.received) for batch in self._open) != rows or int(self._open[0].visible[-1]) != 1:
            raise RequestError(f"{architecture} is not supported: its layer {len(self.layers)} does not compute "
                               "causal attention exactly once.")

    def close_layer(self, rows: torch.Tensor) -> None:
        """All batches of a layer were seen: put them together. rows: int64 [rows, length], those of the walk."""
        batches, self._open = self._open, []
        if not batches:
            nobody = torch.zeros(len(rows), 0, rows.shape[1])
            batches = [LayerAttention(
                nobody, nobody[..., 0], torch.zeros(rows.shape[1], dtype=torch.long), torch.zeros(rows.shape[1]),
                nobody, torch.zeros(0, dtype=torch.float64))]
        self.layers.append(replace(
            batches[0], received=torch.cat([batch.received for batch in batches]),
            learned=torch.cat([batch.learned for batch in batches]),
            value_norms=torch.cat([batch.value_norms for batch in batches]),
            output_norms=torch.stack([batch.output_norms for batch in batches]).sum(0)))

    def sink_rate(self, threshold: float) -> float:
        """Sink rate by Gu et al. (2410.10781, section 3): the share of samples, layers and heads in which the first
        position's mean received attention, over the queries that see it, is over the threshold."""
        return float(torch.stack([(self.layers[index].mass[:, :, 0] > threshold).float().mean()
                                  for index in self.attending]).mean())

    @property
    def attending(self) -> list[int]:
        """Indices of the layers with an attention matrix."""
        return [index for index, layer in enumerate(self.layers) if layer.received.shape[1]]

    def of_heads(self) -> AttentionTable:
        """The same without the layers that have no attention matrix: entry i is layer `attending[i]`."""
        kept = AttentionTable()
        kept.has_learned_sink = self.has_learned_sink
        kept.layers = [self.layers[index] for index in self.attending]
        return kept


def attention_of(walk: Walk) -> AttentionTable:
    """What the attention of every layer gives, of the rows of a walk that begins and ends here."""
    table = AttentionTable()
    walk.observers.append(table)
    for step in walk.steps():
        step.run()
        table.close_layer(walk.rows)
    return table
