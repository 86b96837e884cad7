"""One layer of the cache: packed blocks, a window in full precision, and the exact tokens.

Columns up to P - 1 lie in packed blocks, P .. N - 1 in the window. An exact token is copied into a slot of its own when
it arrives; when its block is packed it is left out of the ranges, and on reading its slot takes its place. Where old
blocks are dropped, the exact tokens of them stand in front, moved up to the columns that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from sinkquant.artifacts.kv import KVCachePlan, passed_blocks, value_group
from sinkquant.cache.rotary import Rotary
from sinkquant.cache.store import PackedStates
from sinkquant.cache.transforms.recoding import LayerBases, recodings
from sinkquant.errors import RequestError

MAX_QUERIES = 16
"""More new tokens than this read a dense copy of the packed blocks: it is then used often enough to pay."""


class SinkLayer(CacheLayerMixin):
    """Keys and values of one attention layer as `plan.layers[index]` says.

    Attributes:
        keys, values: [batch, kv_heads, window part, head_dim] in the model's dtype.
        packed_keys, packed_values: the older tokens.
        exact_keys, exact_values: [batch, kv_heads, slots, head_dim] in the model's dtype.
        exact_columns: int32 [batch, slots] column of every slot, -1 where it is empty.
    """

    is_croppable = True

    def __init__(self, plan: KVCachePlan, index: int) -> None:
        super().__init__()
        self.plan, self.format, self.index = plan, plan.layers[index], index
        self.batch_size = -1
        self.is_sliding = self.format.sliding_window is not None
        self.sees_sinks = plan.sliding_sinks and self.is_sliding
        """Whether the exact tokens are seen beyond a sliding window too; attention then reads them from their slots."""
        self.record_past = False
        self.rotary: Rotary | None = None
        """Moves exact tokens of dropped blocks; set by the cache where the plan drops any."""
        self.bases: LayerBases | None = None
        """What rotates keys and values by covariance; see `take_bases`."""
        self._clear()

    def _clear(self) -> None:
        plan, one = self.plan, self.format
        of_keys, of_values = recodings(plan, self.bases)
        self.packed_keys = PackedStates(one.key_bits, plan.group_size, None, plan.symmetric, of_keys, plan.scale_bits)
        self.packed_values = PackedStates(one.value_bits, plan.group_size, value_group(plan.group_size, one.value_dim),
                                          plan.symmetric, of_values, plan.scale_bits)
        self.lengths: list[int] = []
        """Valid tokens of every block: G, or fewer where `crop` cut into one."""
        self.keys = self.values = self.exact_keys = self.exact_values = torch.empty(0)
        self.exact_columns = torch.empty(0, 0, dtype=torch.int32)
        self.dropped = 0
        """Columns that were dropped, all of them before the first block."""

    def take_bases(self, bases: LayerBases) -> None:
        """Pack through these matrices from now on. Nothing may have been packed through others before."""
        if bases is not self.bases:
            self.bases = bases
            self._recode()

    def _recode(self) -> None:
        bases = self.bases.on(self.device) if self.bases is not None and self.is_initialized else self.bases
        self.packed_keys.recoding, self.packed_values.recoding = recodings(self.plan, bases)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check the shapes against the plan and allocate nothing but empty tensors.

        Raises:
            RequestError: the model has other heads than the plan was made for.
        """
        heads, one = len(self.format.key_bits), self.format
        if key_states.shape[1] != heads or key_states.shape[3] != one.key_dim or value_states.shape[3] != one.value_dim:
            raise RequestError(
                f"layer {self.index} has {heads} KV heads of {one.key_dim} and {one.value_dim} channels in the plan, "
                f"and {key_states.shape[1]} of {key_states.shape[3]} and {value_states.shape[3]} in the model; make a "
                "plan for this model.")
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.exact_keys, self.exact_values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.exact_columns = torch.empty(self.batch_size, 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True
        self._recode()

    @property
    def packs(self) -> bool:
        """Whether any head takes less than 16 bits."""
        return any(bits < 16 for bits in self.format.key_bits + self.format.value_bits)

    @property
    def packed_length(self) -> int:
        """Columns in packed blocks."""
        return sum(self.lengths)

    def get_seq_length(self) -> int:
        """Columns seen so far, dropped ones counted."""
        return self.dropped + self.packed_length + self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that attention will see, column of the first)."""
        first = self.dropped - self.kept_of_dropped()
        return self.get_seq_length() - first + query_length, first

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values: packed ones dequantized, the window and exact tokens as they were."""
        self.append(key_states, value_states)
        return self.dense()

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put new columns into the window. Nothing is packed before `settle`.

        Raises:
            RequestError: another batch size than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise RequestError(f"the KV cache holds {self.batch_size} rows and was given {key_states.shape[0]}; make a "
                               "new cache, or use reset() or batch_repeat_interleave().")
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, [batch, kv_heads, columns, head_dim] each, in the model's dtype."""
        if not self.lengths:
            if not self.dropped:
                return self.keys, self.values
            front_keys, front_values = self.front()
            return torch.cat([front_keys, self.keys], dim=2), torch.cat([front_values, self.values], dim=2)
        both = []
        for packed, window, exact in ((self.packed_keys, self.keys, self.exact_keys),
                                      (self.packed_values, self.values, self.exact_values)):
            states = packed.dense(self.dtype)
            if self.packed_length < states.shape[2]:
                states = states.index_select(2, self.valid_places())
            row, slot = self.packed_slots()
            if len(row):
                states[row, :, self.exact_columns[row, slot].long() - self.dropped] = exact[row, :, slot]
            both.append([states, window])
        if self.dropped:
            both = [[front, *parts] for front, parts in zip(self.front(), both, strict=True)]
        return torch.cat(both[0], dim=2), torch.cat(both[1], dim=2)

    def kept_of_dropped(self) -> int:
        """How many exact tokens of every row lie in dropped blocks and are seen all the same; none in a layer with a
        sliding window, which sees nothing that has left it.

        Raises:
            RequestError: rows have different numbers of them.
        """
        if self.is_sliding or not self.dropped:
            return 0
        columns = self.exact_columns
        counts = ((columns >= 0) & (columns < self.dropped)).sum(1)
        if bool((counts != counts[0]).any()):
            raise RequestError("the rows of this batch keep different numbers of dropped tokens; stream them one by "
                               "one, or set kv_cache.exact to 'first-n'.")
        return int(counts[0])

    def seen_in_slots(self, queries: int) -> torch.Tensor:
        """bool [batch, queries, slots]: which exact tokens the last columns see in their slots, because a sliding
        window hides their own column or it was dropped."""
        assert self.format.sliding_window is not None
        end = self.get_seq_length()
        query = torch.arange(end - queries, end, device=self.exact_columns.device)[None, :, None]
        column = self.exact_columns[:, None]
        hidden = (query - column >= self.format.sliding_window) | ((column < self.dropped) & (column <= query))
        return (column >= 0) & hidden

    def front(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the exact tokens in dropped blocks, moved to where the blocks that are left begin."""
        count = self.kept_of_dropped()
        # Slots fill in the order of columns: the dropped ones come first.
        keys = self.exact_keys[:, :, :count]
        if count:
            assert self.rotary is not None
            # The first sink moves to the column before the others', as if nothing had stood between.
            columns = self.exact_columns[:, :count]
            targets = torch.arange(self.dropped - count, self.dropped, device=columns.device, dtype=columns.dtype)
            keys = self.rotary.move(keys, targets - columns)
        return keys, self.exact_values[:, :, :count]

    def worth_reading_packed(self, queries: int) -> bool:
        """Whether a few new tokens can attend to packed blocks as they are."""
        return bool(self.lengths) and self.packs and queries <= MAX_QUERIES

    def packed_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(row, slot) of every exact token that lies in a packed block."""
        places = self.exact_columns - self.dropped
        row, slot = torch.nonzero((self.exact_columns >= 0) & (places >= 0) & (places < self.packed_length),
                                  as_tuple=True)
        return row, slot

    def valid_places(self) -> torch.Tensor:
        """Places in the blocks, laid end to end, that hold a column."""
        size = self.plan.group_size
        return torch.cat([torch.arange(i * size, i * size + n, device=self.device)
                          for i, n in enumerate(self.lengths)])

    def peel(self, flags: torch.Tensor) -> None:
        """Copy flagged tokens into slots, at most `max_exact` per row, the first ones first.

        Args:
            flags: bool [batch, n] for the last n columns, all of them in the window; on the device of the token ids.
        """
        flags = flags.to(self.device)
        used = (self.exact_columns >= 0).sum(1)
        room = self.plan.max_exact + len(self.plan.prefix)
        take = flags & (flags.cumsum(1) + used[:, None] <= room)
        row, place = torch.nonzero(take, as_tuple=True)
        if not len(row):
            return
        slot = (used[:, None] + take.cumsum(1) - 1)[row, place]
        missing = int(slot.max()) + 1 - self.exact_columns.shape[1]
        if missing > 0:
            batch, heads = self.keys.shape[:2]
            self.exact_keys, self.exact_values = (
                torch.cat([old, old.new_zeros(batch, heads, missing, old.shape[3])], dim=2)
                for old in (self.exact_keys, self.exact_values))
            empty = self.exact_columns.new_full((batch, missing), -1)
            self.exact_columns = torch.cat([self.exact_columns, empty], dim=1)
        in_window = self.keys.shape[2] - flags.shape[1] + place
        self.exact_keys[row, :, slot] = self.keys[row, :, in_window]
        self.exact_values[row, :, slot] = self.values[row, :, in_window]
        self.exact_columns[row, slot] = (self.dropped + self.packed_length + in_window).to(torch.int32)

    def settle(self, row_starts: torch.Tensor | None = None) -> None:
        """Pack whole blocks until the window holds less than a block more than it should.

        Args:
            row_starts: int32 [batch] first column of every row that is no padding; None for no padding.
        """
        size = self.plan.group_size
        blocks = (self.keys.shape[2] - self.plan.window) // size
        if blocks < 1:
            self._evict()
            return
        count = blocks * size
        counted = self._counted(count, row_starts)
        self.packed_keys.append(self.keys[:, :, :count], counted)
        self.packed_values.append(self.values[:, :, :count], counted)
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()
        self.lengths += [size] * blocks
        self._evict()

    def _evict(self, recorded: bool = False) -> None:
        """Drop the oldest blocks: those that a sliding window has left behind, or that the plan has no room for.

        Args:
            recorded: drop what `activate_past_recording` keeps too.
        """
        size, sliding, surplus = self.plan.group_size, self.format.sliding_window, 0
        if sliding is not None:
            if recorded or not self.record_past:
                surplus = min(len(self.lengths), passed_blocks(self.get_seq_length() - self.dropped, size, sliding))
        elif self.plan.evict is not None:
            surplus = len(self.lengths) - self.plan.evict // size
        if surplus > 0:
            for packed in (self.packed_keys, self.packed_values):
                packed.keep_blocks(surplus, len(self.lengths))
            self.dropped += sum(self.lengths[:surplus])
            self.lengths = self.lengths[surplus:]

    def _counted(self, count: int, row_starts: torch.Tensor | None) -> torch.Tensor | None:
        """Which of the window's first `count` columns set the ranges: no exact token, no padding. None for all."""
        first = self.dropped + self.packed_length
        places = self.exact_columns - first
        row, slot = torch.nonzero((places >= 0) & (places < count), as_tuple=True)
        padded = row_starts is not None and bool((row_starts > first).any())
        if not len(row) and not padded:
            return None
        counted = torch.ones(self.batch_size, count, dtype=torch.bool, device=self.device)
        counted[row, places[row, slot].long()] = False
        if row_starts is not None:
            column = torch.arange(first, first + count, device=self.device)
            counted &= column[None] >= row_starts[:, None].to(self.device)
        return counted

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, `tokens_to_remove` being their negative number. A block that the cut goes through
        stays packed as it is.

        Raises:
            ValueError: a positive number.
            RequestError: the tokens that would be the last ones, or those that a sliding window sees again, have been
                dropped.
        """
        remaining = self.left_by_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        if tokens_to_remove == 0:
            self._evict(recorded=True)
            return
        inside = max(0, remaining - self.packed_length)
        self.keys, self.values = self.keys[:, :, :inside].clone(), self.values[:, :, :inside].clone()
        cut, blocks = self.packed_length - remaining, len(self.lengths)
        while cut > 0:
            last = self.lengths.pop()
            self.lengths += [last - cut] if last > cut else []
            cut -= last
        if len(self.lengths) < blocks:
            self.packed_keys.keep_blocks(0, len(self.lengths))
            self.packed_values.keep_blocks(0, len(self.lengths))
        # Slots fill in the order of columns, so that those beyond the cut are the last ones of every row.
        columns = self.exact_columns.masked_fill(self.exact_columns >= self.dropped + remaining, -1)
        slots = int((columns >= 0).sum(1).max()) if columns.numel() else 0
        self.exact_columns = columns[:, :slots].clone()
        self.exact_keys = self.exact_keys[:, :, :slots].clone()
        self.exact_values = self.exact_values[:, :, :slots].clone()
        self._evict(recorded=True)

    def left_by_crop(self, tokens_to_remove: int) -> int:
        """Columns that `crop` would leave of those that are held. Raises as it does, and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the negative number of tokens to remove from the end.")
        remaining = max(0, self.get_seq_length() + tokens_to_remove) - self.dropped
        if remaining < 0:
            raise RequestError("crop reaches into tokens that the KV cache has dropped; start a new cache.")
        window = self.format.sliding_window
        if tokens_to_remove and window is not None and self.dropped > max(0, self.dropped + remaining - window + 1):
            raise RequestError("crop brings tokens back into a sliding window that the KV cache has dropped; call "
                               "activate_past_recording() on a new cache before it is filled.")
        return remaining

    def activate_past_recording(self) -> None:
        """From now on a sliding window keeps what it has left behind until the next `crop`."""
        self.record_past = True

    def reset(self) -> None:
        """Forget everything; the next update may have another batch size."""
        self.is_initialized, self.batch_size = False, -1
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._on_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`: their numbers, or bool [batch]."""
        self._on_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._on_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._on_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _on_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function of the batch dimension to everything that is held."""
        if not self.is_initialized:
            return
        for name in ("keys", "values", "exact_keys", "exact_values", "exact_columns"):
            setattr(self, name, function(getattr(self, name)))
        self.packed_keys.apply(function)
        self.packed_values.apply(function)
        self.batch_size = self.keys.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that is held, by name: what `nbytes` counts and `save` writes."""
        if not self.is_initialized:
            return {}
        own = {name: getattr(self, name) for name in ("keys", "values", "exact_keys", "exact_values", "exact_columns")}
        return (own | {f"packed_keys.{name}": tensor for name, tensor in self.packed_keys.tensors().items()}
                | {f"packed_values.{name}": tensor for name, tensor in self.packed_values.tensors().items()})

    def restore(self, tensors: dict[str, torch.Tensor], lengths: list[int], dropped: int) -> None:
        """Take back what `tensors` gave, the lengths of the blocks and the number of columns that were dropped."""
        self._clear()
        self.lazy_initialization(tensors["keys"], tensors["values"])
        for name in ("keys", "values", "exact_keys", "exact_values", "exact_columns"):
            setattr(self, name, tensors[name])
        for name, packed in (("packed_keys.", self.packed_keys), ("packed_values.", self.packed_values)):
            packed.restore({key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)})
        self.lengths, self.dropped = list(lengths), dropped
