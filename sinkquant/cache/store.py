"""The packed blocks of one layer's keys, or of its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkquant.cache.grid import dequantize, quantize, recoded, start_of
from sinkquant.cache.packing import pack, unpack
from sinkquant.cache.scales import narrowed, wide_scale, wide_zero, widened
from sinkquant.cache.transforms.recoding import Recoding
from sinkquant.cache.transforms.tokens import unit_tokens


@dataclass
class Lane:
    """The heads of a layer that share a number of bits.

    Attributes:
        heads: their indices.
        data: uint8 [batch, heads, blocks, G * bits / 8, D]; at 16 bits [batch, heads, blocks, G, D] as they came.
        scale, zero: float16 [batch, heads, blocks, ...] as `grid.quantize` gives them, or uint8 and int8 as
            `scales.narrowed` does, whose `ends` then stand beside them; None where there are none.
        norm: float16 [batch, heads, blocks, G, 1] lengths of tokens, None where they are not scaled.
    """

    bits: int
    heads: list[int]
    data: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    def steps(self, part: slice = slice(None)) -> torch.Tensor:
        """What one code is worth in some blocks, float32 in the shape of the scales."""
        assert self.scale is not None
        return wide_scale(self.scale[:, :, part], None if self.ends is None else self.ends[:, :, part])

    def starts(self) -> torch.Tensor:
        """What code 0 stands for, float32 in the shape of the scales."""
        return -0.5 * (2**self.bits - 1) * self.steps() if self.zero is None else wide_zero(self.zero, self.ends)


CHUNK_VALUES = 1 << 18
"""Numbers that are packed, or unpacked, at a time, 1 MB in float32: what is computed on the way stays in the
processor's cache."""
HELD = ("data", "scale", "zero", "norm", "ends")


class PackedStates:
    """Blocks of G tokens, each quantized once when it is appended and never again.

    Args:
        bits: one number per head, 1, 2, 3, 4, 8 or 16.
        block: G.
        group: None for scales per channel over a block (keys), else channels per scale of a token (values).
        scale_bits: 16, or 8 for scales and zeros of 8 bits.
        recoding: what states go through before they are packed; not those of 16 bits.
    """

    def __init__(self, bits: list[int], block: int, group: int | None, symmetric: bool,
                 recoding: Recoding | None = None, scale_bits: int = 16) -> None:
        self.block, self.group, self.symmetric, self.scale_bits = block, group, symmetric, scale_bits
        self.recoding = recoding or Recoding()
        self.heads = len(bits)
        self.lanes = [Lane(width, [head for head, b in enumerate(bits) if b == width]) for width in sorted(set(bits))]

    @property
    def blocks(self) -> int:
        """How many blocks are held."""
        data = self.lanes[0].data
        return 0 if data is None else data.shape[2]

    @torch.no_grad()
    def append(self, states: torch.Tensor, counted: torch.Tensor | None) -> None:
        """Quantize and keep whole blocks.

        Args:
            states: [batch, heads, n * G, D].
            counted: bool [batch, n * G], the tokens that set the ranges; None for all.
        """
        blocks = states.unflatten(2, (-1, self.block))
        mask = None if counted is None else counted.unflatten(1, (-1, self.block))[:, None, :, :, None]
        for lane in self.lanes:
            part = blocks if len(self.lanes) == 1 else blocks[:, lane.heads]
            batch, heads, count, size, width = part.shape
            step = count if lane.bits == 16 else max(1, CHUNK_VALUES // (batch * heads * size * width))
            pieces = [self._packed(lane, part[:, :, start:start + step],
                                   None if mask is None else mask[:, :, start:start + step])
                      for start in range(0, count, step)]
            for name, *new in zip(HELD, *pieces, strict=True):
                held = [tensor for tensor in (getattr(lane, name), *new) if tensor is not None]
                setattr(lane, name, held[0] if len(held) == 1 else torch.cat(held, dim=2) if held else None)

    def _packed(self, lane: Lane, part: torch.Tensor, counted: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """What a lane holds, in the order of `HELD`, of some blocks [batch, heads, blocks, G, D] of its heads."""
        if lane.bits == 16:
            return part.clone(), None, None, None, None
        counted = None if counted is None or bool(counted.all()) else counted
        recoding, norm, ends = self.recoding.of(lane.heads), None, None
        part = part if recoding.rotation is None else recoding.rotation.into(part)
        if recoding.scale_tokens:
            part, norm = unit_tokens(part)
        codes, scale, zero = quantize(part, counted, lane.bits, self.group, self.symmetric, recoding.clip)
        if self.scale_bits == 8:
            scale, zero, ends = narrowed(scale, zero)
        if recoding.descent is not None:
            step, first = widened(scale, zero, ends)
            codes = recoding.descent.codes(part, step, start_of(step, first, 2**lane.bits - 1), 2**lane.bits - 1)
        elif ends is not None:
            codes = recoded(part, *widened(scale, zero, ends), lane.bits, self.group)
        return pack(codes, lane.bits), scale, zero, norm, ends

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[batch, heads, blocks * G, D] in `dtype`. There must be at least one block."""
        return self.in_order([self._dense_lane(lane, dtype).flatten(2, 3) for lane in self.lanes])

    def in_order(self, by_lane: list[torch.Tensor]) -> torch.Tensor:
        """What the lanes give, [batch, heads, ...] each, with heads in the model's order again."""
        if len(by_lane) == 1:
            return by_lane[0]
        order = torch.tensor([head for lane in self.lanes for head in lane.heads], device=by_lane[0].device)
        return torch.cat(by_lane, dim=1).index_select(1, order.argsort())

    def _dense_lane(self, lane: Lane, dtype: torch.dtype) -> torch.Tensor:
        assert lane.data is not None
        if lane.scale is None:
            return lane.data.to(dtype)
        rotation = self.recoding.of(lane.heads).rotation
        as_is = rotation is None and lane.norm is None
        scale, zero = widened(lane.scale, lane.zero, lane.ends)
        values = dequantize(unpack(lane.data, lane.bits), scale, zero, lane.bits, self.group,
                            dtype if as_is else torch.float32)
        values = values if lane.norm is None else values * lane.norm.float()
        return (values if rotation is None else rotation.back(values)).to(dtype)

    def keep_blocks(self, start: int, stop: int) -> None:
        """Drop all blocks but start..stop."""
        self.apply(lambda tensor: tensor[:, :, start:stop].clone())

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor that is held by `function` of it."""
        for lane in self.lanes:
            for name in HELD:
                tensor = getattr(lane, name)
                if tensor is not None:
                    setattr(lane, name, function(tensor))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that is held, by name."""
        return {f"{lane.bits}.{name}": tensor for lane in self.lanes for name in HELD
                if (tensor := getattr(lane, name)) is not None}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""
        for lane in self.lanes:
            for name in HELD:
                setattr(lane, name, tensors.get(f"{lane.bits}.{name}"))
