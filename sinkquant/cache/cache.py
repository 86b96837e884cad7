"""SinkCache: a transformers cache that packs keys and values and keeps this prompt's sinks exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.attention import PackedRead
from sinkquant.cache.bases import Bases, needs_bases
from sinkquant.cache.exact import Massive, NewTokens, exact_tokens
from sinkquant.cache.hadamard import is_power_of_two
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.prefix import Prefix, PrefixMatch
from sinkquant.cache.rotary import Rotary
from sinkquant.cache.stand_in import stand_ins
from sinkquant.errors import RequestError


class SinkCache(Cache):
    """For `model.generate(past_key_values=SinkCache(model.config, plan.kv_cache))`, or a forward pass.

    Keys are packed per channel in groups along time and values per token in groups along the head (KIVI 2402.02750,
    section 3); sinks leave their group before its range is taken. Which layers are packed, and how, is the plan's.

    Sinks that are known by their token, padded batches and the "massive" policy need `sinkquant.cache.prepare(model)`
    once: transformers shows a cache neither tokens nor masks.

    Args:
        config: the model's configuration.
        plan: the `kv_cache` section of a plan.

    Raises:
        RequestError: the plan is of another model, or no layer of the model holds keys and values.
    """

    def __init__(self, config: PreTrainedConfig, plan: KVCachePlan) -> None:
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        if len(types) != len(plan.layers):
            raise RequestError(f"the KV plan is for {len(plan.layers)} layers and this model has {len(types)}; make a "
                               "plan for this model.")
        if not any(layer.key_bits for layer in plan.layers):
            raise RequestError("no layer of this model holds keys and values; leave kv_cache out.")
        if any(rotation == "hadamard" and not is_power_of_two(width) for layer in plan.layers if layer.packed
               for rotation, width in ((plan.rotate, layer.key_dim), (plan.value_rotation, layer.value_dim))):
            raise RequestError("the KV plan rotates heads whose width is no power of two; set kv_cache.rotate to "
                               "'covariance' or 'none'.")
        if plan.sliding_sinks and plan.exact == "massive":
            raise RequestError("kv_cache.sliding_sinks needs sinks that are known before a pass, and 'massive' finds "
                               "them in it; use 'detected' or 'first-n'.")
        super().__init__(layers=[
            SinkLayer(plan, index) if plan.layers[index].packed else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
            for index, (kind, kwargs) in enumerate(zip(types, arguments, strict=True))])
        self.plan = plan
        self.exact = exact_tokens(plan)
        self.row_starts: torch.Tensor | None = None
        """int32 [batch] first column of every row that is no padding, where a watched model has shown its mask."""
        self._flags: torch.Tensor | None = None
        self._real = torch.empty(0, 0, dtype=torch.bool)
        self._flagged_from = -1
        self._waiting: list[int] = []
        self._packed_reads = False
        self._match: PrefixMatch | None = None
        self.matched: torch.Tensor | None = None
        """int64 [batch] how many tokens of the prefix every row has begun with; None before any was shown."""
        # Later layers read what earlier ones hold: nothing may be packed or dropped before the last of them.
        self._shares = bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))
        self._unpacked: list[int] = []

    def see(self, ids: torch.Tensor | None, mask: torch.Tensor | None, size: tuple[int, int], device: torch.device,
            packed_reads: bool, prefix: Prefix | None = None, rotary: Rotary | None = None,
            bases: Bases | None = None) -> None:
        """Look at what a forward pass is about to add; called by the hook that `prepare` sets.

        Args:
            ids: int64 [batch, new], or None.
            mask: [batch, columns before + new], zero on padding, or None for no padding.
            size: batch and new.
            packed_reads: whether the model's attention can be given a packed layer.
            prefix: what the model has been given for rows that begin with `plan.prefix`.
            rotary: the model's, where the plan drops tokens.
            bases: the matrices that the model has been given to rotate keys and values by.

        Raises:
            RequestError: another batch size than before, the prefix or the matrices of the plan are missing, or the
                attention cannot be given sinks beyond a sliding window.
        """
        self.passed()
        batch, new = size
        if self.plan.sliding_sinks and not packed_reads:
            raise RequestError("kv_cache.sliding_sinks shows attention what a sliding window hides; call "
                               "sinkquant.cache.prepare(model) once, on a model with sdpa or eager attention.")
        # Not of the first layer: a layer before ours may have been updated already.
        before = next((layer.get_seq_length() for layer in self.layers if isinstance(layer, SinkLayer)), 0)
        if before and self.row_starts is not None and len(self.row_starts) != batch:
            raise RequestError(f"the KV cache holds {len(self.row_starts)} rows and was given {batch}; make a "
                               "new cache, or use reset() or batch_repeat_interleave().")
        if mask is not None and (mask.dim() != 2 or mask.shape[1] < before + new):
            mask = None
        if mask is None:
            if before == 0 or self.row_starts is None:
                self.row_starts = torch.zeros(batch, dtype=torch.int32, device=device)
            positions = torch.arange(before, before + new, device=device).expand(batch, new)
            positions = positions - self.row_starts[:, None]
        else:
            seen = mask[:, :before + new].long()
            # Anew every time: the first chunk of a long prompt may hold nothing of a row but padding.
            self.row_starts = (seen.cumsum(1) == 0).sum(1).to(torch.int32)
            positions = (seen.cumsum(1) - 1).masked_fill(seen == 0, -1)[:, before:]
        self._match = self._match_prefix(prefix, positions, ids) if self.plan.prefix else None
        self.matched = None if self._match is None else self._match.matched
        self._real, self._flagged_from = positions >= 0, before
        self._flags = self._judge(NewTokens(positions, ids))
        self._packed_reads = packed_reads
        if self.plan.evict is not None:
            self._take_rotary(rotary)
        if needs_bases(self.plan):
            self._take_bases(bases)

    @property
    def from_prefix(self) -> torch.Tensor | None:
        """bool [batch, new]: which tokens of this pass take their keys and values from the prefix; None without one."""
        return None if self._match is None else self._match.flags

    def _judge(self, new: NewTokens) -> torch.Tensor | None:
        flags = self.exact.flags(new)
        if self._match is not None:
            flags = self._match.flags if flags is None else flags | self._match.flags
        return flags if flags is not None and bool(flags.any()) else None

    def _match_prefix(self, prefix: Prefix | None, positions: torch.Tensor,
                      ids: torch.Tensor | None) -> PrefixMatch:
        if prefix is None or list(prefix.ids) != self.plan.prefix:
            raise RequestError("the KV plan starts rows from a prefix that this model was not given; load the "
                               "checkpoint with sinkquant.load, or call sinkquant.cache.prepare(model, prefix).")
        if ids is None:
            raise RequestError("the KV plan starts rows from a prefix, but the cache was not shown the tokens; pass "
                               "input_ids.")
        before = torch.zeros_like(positions[:, 0])
        if self.matched is not None and len(self.matched) == len(before):
            before = self.matched.to(before.device)
        return PrefixMatch(prefix, before, ids, positions)

    def _take_bases(self, bases: Bases | None) -> None:
        packed = [layer for layer in self.layers if isinstance(layer, SinkLayer)]
        if bases is None or any(layer.index not in bases.layers or bases.layers[layer.index].lacks(self.plan)
                                for layer in packed if layer.packs):
            raise RequestError("the KV plan rotates by matrices that this model was not given; load the checkpoint "
                               "with sinkquant.load, or hand what find_bases gives to sinkquant.cache.prepare.")
        for layer in packed:
            if layer.packs:
                layer.take_bases(bases.layers[layer.index])

    def _take_rotary(self, rotary: Rotary | None) -> None:
        if rotary is None:
            raise RequestError("kv_cache.evict moves sinks by the model's rotary positions, and nothing shows them to "
                               "the cache; call sinkquant.cache.prepare(model) once before generating.")
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.rotary = rotary

    def hidden_states(self, block: int, hidden: torch.Tensor) -> None:
        """Look at the hidden states [batch, new, hidden] after a block; called by the hook that `prepare` sets."""
        if not isinstance(self.exact, Massive) or block != self.exact.carriers.layer or hidden.dim() != 3:
            return
        flags = self.exact.verdict(hidden) & self._real.to(hidden.device)
        if self._match is not None:
            flags = flags | self._match.flags.to(hidden.device)
        self._flags = flags if bool(flags.any()) else None
        waiting, self._waiting = self._waiting, []
        for index in waiting:
            self._settle(index)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's new keys and values and return all of them; see `transformers.Cache.update`.

        The new ones come back as they are, older ones as they are stored: a prompt that is read in one pass is not
        disturbed by its own packing.

        Raises:
            RequestError: another batch size than before, or a policy that was not shown what it needs.
        """
        layer = self.layers[layer_idx]
        if self._match is not None:
            key_states, value_states = self._match.put(layer_idx, key_states, value_states)
        if not isinstance(layer, SinkLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        before = layer.get_seq_length()
        if before != self._flagged_from:
            self._see_unwatched(key_states, before)
        if self._packed_reads and (layer.sees_sinks or layer.worth_reading_packed(key_states.shape[2])):
            layer.append(key_states, value_states)
            if layer.sees_sinks and self._flags is not None:
                # A prompt longer than the window sees its own sinks, so that they must have their slots by now.
                layer.peel(self._flags)
            read = PackedRead(layer, functools.partial(
                self._unpacked.append if self._shares else self._was_read, layer_idx))
            return stand_ins(read, key_states, value_states, layer.get_seq_length())
        states = layer.update(key_states, value_states)
        self._was_read(layer_idx)
        return states

    def passed(self) -> None:
        """The forward pass is over; called by the hook that `prepare` sets."""
        waiting, self._unpacked = self._unpacked, []
        for index in waiting:
            self._settle(index)

    def _was_read(self, index: int) -> None:
        """Pack what has left the window, now or once the verdict on exact tokens is there."""
        if isinstance(self.exact, Massive) and index <= self.exact.carriers.layer:
            self._waiting.append(index)
        else:
            self._settle(index)

    def _settle(self, index: int) -> None:
        layer = self.layers[index]
        if self._flags is not None and not layer.sees_sinks:
            layer.peel(self._flags)
        layer.settle(self.row_starts)

    def _see_unwatched(self, key_states: torch.Tensor, before: int) -> None:
        """Nothing showed the tokens: go on only where nothing depends on them.

        Raises:
            RequestError: a policy needs the tokens, the mask or the hidden states.
        """
        if isinstance(self.exact, Massive):
            raise RequestError("kv_cache.exact is 'massive', and nothing shows the cache the hidden states; call "
                               "sinkquant.cache.prepare(model) once before generating.")
        if key_states.shape[0] > 1 and self.plan.exact != "none" and before == 0:
            raise RequestError("the KV cache keeps sinks by their place in the row, and a batch may be padded; call "
                               "sinkquant.cache.prepare(model) once, so that the cache sees the attention mask.")
        batch, _, new, _ = key_states.shape
        self.see(None, None, (batch, new), key_states.device, False)

    def nbytes(self) -> int:
        """Bytes held by the packed layers, exact tokens, windows and row starts counted; what
        `sinkquant.artifacts.kv.cache_bytes` predicts."""
        own = [tensor for layer in self.layers if isinstance(layer, SinkLayer) for tensor in layer.tensors().values()]
        if self.row_starts is not None:
            own.append(self.row_starts)
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def reset(self) -> None:
        """Forget everything, the batch size too."""
        super().reset()
        self.row_starts, self._flags, self._flagged_from, self._waiting = None, None, -1, []
        self._match, self.matched, self._unpacked = None, None, []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; see `transformers.Cache.crop`. A crop that one of our layers
        refuses changes none."""
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                layer.left_by_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self._flags, self._flagged_from, self._match = None, -1, None
        if self.matched is not None and self.row_starts is not None:
            left = next((layer.get_seq_length() for layer in self.layers if isinstance(layer, SinkLayer)), 0)
            self.matched = torch.minimum(self.matched, (left - self.row_starts).clamp_min(0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order, for beam search."""
        super().reorder_cache(beam_idx)
        self._on_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._on_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        super().batch_select_indices(indices)
        self._on_rows(lambda rows: rows[indices.to(rows.device)])

    def _on_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.row_starts = None if self.row_starts is None else function(self.row_starts)
        self.matched = None if self.matched is None else function(self.matched)
