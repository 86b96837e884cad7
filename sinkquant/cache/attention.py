"""Decode attention that reads packed blocks as they are: no dense copy of the history is ever made.

On a CPU a small C++ library reads the blocks (`read_native`), where there is a compiler; elsewhere torch does
(`read_torch`). The softmax is taken once over all scores in float32; exact tokens and the window join it from their
full-precision copies. One new token on an NVIDIA GPU goes through a Triton kernel instead.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.read_native import NativeReads, reads_on
from sinkquant.cache.read_torch import TorchReads
from sinkquant.cache.store import Lane, PackedStates
from sinkquant.errors import RequestError

KERNEL_WIDTH, KERNEL_HEADS = 256, 16
"""The widest head, and the most query heads of a KV head, whose tiles fit into the shared memory of small GPUs."""
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass
class PackedRead:
    """How a layer is read by `attend`, and what packs its window once it has been read.

    Attributes:
        pack: called once, however often the layer is read: some models hand it on to others.
        copies: of all keys and values, where the model does something else with them than attend.
    """

    layer: SinkLayer
    pack: Callable[[], None]
    copies: tuple[torch.Tensor, torch.Tensor] | None = None
    settled: bool = False

    def settle(self) -> None:
        """The layer has been read."""
        if not self.settled:
            self.settled = True
            self.pack()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The copies, which read the layer.

        Raises:
            RequestError: the layer shows sinks beyond its sliding window, for which there is no place among them.
        """
        if self.layer.sees_sinks:
            raise RequestError("this model changes keys or values after they are cached, so that it cannot be shown "
                               "the sinks; leave kv_cache.sliding_sinks out.")
        if self.copies is None:
            self.copies = self.layer.dense()
            self.settle()
        return self.copies


def attend(layer: SinkLayer, query: torch.Tensor, mask: torch.Tensor | None, scale: float,
           softcap: float | None = None, learned: torch.Tensor | None = None, slots: bool = False) -> torch.Tensor:
    """Attention of new queries over everything that a layer holds.

    Args:
        query: [batch, heads, new, key_dim], the last `new` columns of the layer being theirs.
        mask: [batch or 1, 1 or heads, new, columns], bool (True: visible) or to be added; None for causal.
        softcap: scores become softcap * tanh(score / softcap).
        learned: [heads] logits of a learned sink column that takes its share of the softmax and gives nothing.
        slots: the first columns of the mask are the layer's exact slots; see `with_slots`.

    Returns:
        [batch, new, heads, value_dim] in the query's dtype.
    """
    batch, heads, new, _ = query.shape
    kv_heads = layer.keys.shape[1]
    if not slots and kernel_reads(layer, query.device, new, heads):
        # Imported here, because Triton is not everywhere and takes seconds.
        from sinkquant.cache.triton_decode import attend_one

        return attend_one(layer, query, mask, scale, softcap, learned)
    # The rows of one KV head: its query heads, and in each the new tokens.
    q = query.float().reshape(batch, kv_heads, heads // kv_heads * new, -1) * scale
    valid = None if layer.packed_length == layer.packed_keys.blocks * layer.plan.group_size else layer.valid_places()
    scores = _packed_scores(layer.packed_keys, q)
    if valid is not None:
        scores = scores.index_select(-1, valid)
    row, slot = layer.packed_slots()
    column = layer.exact_columns[row, slot].long() - layer.dropped
    if len(row):
        scores[row, :, :, column] = (q @ layer.exact_keys.float().mT)[row, :, :, slot]
    front_keys, front_values = (layer.exact_keys, layer.exact_values) if slots else layer.front()
    front = front_keys.shape[2]
    scores = torch.cat([q @ front_keys.float().mT, scores, q @ layer.keys.float().mT], dim=-1)
    weights = _softmax(scores.view(batch, heads, new, -1), mask, softcap, learned).reshape(scores.shape)

    end = front + layer.packed_length
    packed = weights[..., front:end].clone()
    out = weights[..., end:] @ layer.values.float() + weights[..., :front] @ front_values.float()
    if len(row):
        exact = weights.new_zeros(*weights.shape[:3], layer.exact_columns.shape[1])
        exact[row, :, :, slot] = packed[row, :, :, column]
        packed[row, :, :, column] = 0
        out += exact @ layer.exact_values.float()
    if valid is not None:
        places = packed.new_zeros(*packed.shape[:3], layer.packed_values.blocks * layer.plan.group_size)
        packed = places.index_copy_(-1, valid, packed)
    out += _packed_output(layer.packed_values, packed)
    return out.view(batch, heads, new, -1).transpose(1, 2).to(query.dtype)


def kernel_reads(layer: SinkLayer, device: torch.device, new: int, heads: int) -> bool:
    """Whether the Triton kernel reads the packed blocks for `new` tokens of `heads` query heads: where all KV heads
    have the same number of bits below 16, for keys and for values, and no lengths stand beside them. What it gives
    differs by rounding only."""
    stored, one = (layer.packed_keys, layer.packed_values), layer.format
    return (device.type == "cuda" and torch.version.hip is None and HAS_TRITON and new == 1 and bool(layer.lengths)
            and all(len(packed.lanes) == 1 and packed.lanes[0].bits < 16 for packed in stored)
            and not layer.plan.scale_tokens and max(one.key_dim, one.value_dim) <= KERNEL_WIDTH
            and heads <= KERNEL_HEADS * len(one.key_bits))


def with_slots(mask: torch.Tensor | None, seen: torch.Tensor, columns: int) -> torch.Tensor:
    """The mask of a layer whose exact slots stand before its columns.

    Args:
        mask: [batch or 1, 1 or heads, new, columns] as `attend` takes it.
        seen: bool [batch, new, slots], whether a new token sees a slot.

    Returns:
        [batch, 1 or heads, new, slots + columns] in the dtype of the mask.
    """
    batch, new, _ = seen.shape
    if mask is None:
        mask = torch.ones(new, columns, dtype=torch.bool, device=seen.device).tril(columns - new)[None, None]
    mask = mask[..., :columns].expand(batch, -1, -1, -1)
    front = seen[:, None].expand(-1, mask.shape[1], -1, -1)
    if mask.dtype != torch.bool:
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, torch.finfo(mask.dtype).min)
    return torch.cat([front, mask], dim=-1)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, softcap: float | None,
             learned: torch.Tensor | None) -> torch.Tensor:
    batch, heads, new, columns = scores.shape
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and new > 1:
        mask = torch.ones(new, columns, dtype=torch.bool, device=scores.device).tril(columns - new)[None, None]
    if mask is not None:
        part = mask[..., :columns]
        # Not -inf: a query of padding may see nothing at all, and its NaN would come back through its value.
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~part, hidden) if part.dtype == torch.bool else scores + part.float()
    if learned is None:
        return torch.softmax(scores, dim=-1)
    column = learned.float().reshape(1, -1, 1, 1).expand(batch, heads, new, 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def _packed_scores(packed: PackedStates, q: torch.Tensor) -> torch.Tensor:
    """float32 [batch, kv_heads, rows, blocks * G] of queries [batch, kv_heads, rows, key_dim]."""
    by_lane = []
    for lane in packed.lanes:
        mine = q if len(packed.lanes) == 1 else q[:, lane.heads]
        rotation = packed.recoding.of(lane.heads).rotation if lane.bits < 16 else None
        mine = mine if rotation is None else rotation.query(mine)
        scores = _reads(lane, q.device).scores(lane, packed.block, mine)
        if lane.norm is not None:
            scores *= lane.norm.float().flatten(2)[:, :, None]
        by_lane.append(scores)
    return packed.in_order(by_lane)


def _packed_output(packed: PackedStates, weights: torch.Tensor) -> torch.Tensor:
    """float32 [batch, kv_heads, rows, value_dim] of softmax weights [batch, kv_heads, rows, blocks * G]."""
    by_lane = []
    for lane in packed.lanes:
        mine = weights if len(packed.lanes) == 1 else weights[:, lane.heads]
        out = _reads(lane, weights.device).sums(lane, packed.block, mine)
        rotation = packed.recoding.of(lane.heads).rotation if lane.bits < 16 else None
        by_lane.append(out if rotation is None else rotation.back(out))
    return packed.in_order(by_lane)


def _reads(lane: Lane, device: torch.device) -> TorchReads | NativeReads:
    return TorchReads() if lane.bits == 16 else reads_on(device)
