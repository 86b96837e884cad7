"""A cache for rows that are scored, not continued: they come in one pass and are read as if in chunks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.chunked import ChunkedRead
from sinkquant.cache.dispatch import reads_packed
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.stand_in import stand_ins


def reads_whole(model: PreTrainedModel, plan: KVCachePlan) -> bool:
    """Whether one pass gives the scores of chunk by chunk.

    Not where columns are dropped and the sinks move up, where a sliding window shows them beyond itself, where exact
    tokens are known only after some block, and where the model's attention is not ours to read with.
    """
    return plan.evict is None and not plan.sliding_sinks and plan.exact != "massive" and reads_packed(model)


class WholeRows(SinkCache):
    """See `SinkCache` for the arguments. It takes one pass, and keeps nothing of a layer that was read."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Pack all that leaves the window, and hand both to attention: the new states, and what packing left of them.

        Raises:
            RequestError: a policy was not shown what it needs.
        """
        layer = self.layers[layer_idx]
        if self._match is not None:
            key_states, value_states = self._match.put(layer_idx, key_states, value_states)
        if not isinstance(layer, SinkLayer):
            return key_states, value_states
        layer.activate_past_recording()  # a query in front still sees what a sliding window has left at the end
        layer.append(key_states, value_states)
        if self._flags is not None:
            layer.peel(self._flags)
        layer.settle(self.row_starts)
        read = ChunkedRead(self.plan, key_states, value_states, *layer.dense())
        layer.reset()
        return stand_ins(read, key_states, value_states, key_states.shape[2])
