"""The KV section of a plan: bits per layer and head, which tokens stay exact, and what it all weighs to the byte.

The accounting is that of the literature, for keys and values apart and with ragged blocks counted:
`bits = [S*16 + W*16 + (N-S-W) * (b + (scale + zero bits) / G) + index bits] / N`
for N tokens, S exact ones, a residual window of W, b-bit codes and groups of G (KIVI 2402.02750, KVQuant 2401.18079).
Here an exact token keeps its (empty) place in its block, so that S adds to N and is not taken off it.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from sinkquant.artifacts.base import Strict

ExactPolicy = Literal["none", "first-n", "detected", "massive"]


def _named(rotation: object) -> object:
    """Recipes and plans said true for a Hadamard rotation before there were others."""
    return {True: "hadamard", False: "none"}[rotation] if isinstance(rotation, bool) else rotation


KVRotation = Annotated[Literal["none", "hadamard", "covariance"], BeforeValidator(_named)]
"""What the channels of a head go through before they are packed; see `sinkquant.cache.transforms`."""
KVClip = Literal["none", "keys", "values", "both"]
KVRounding = Literal["nearest", "descent"]
KVBits = Literal[1, 2, 3, 4, 8, 16]
"""Of the keys or values of a head; 16 leaves them as they are."""
KV_BITS: tuple[int, ...] = get_args(KVBits)
KVScaleBits = Literal[8, 16]
"""Of the scales and zeros of packed blocks."""
SCALE_BYTES = 2
POSITION_BYTES = 4
"""An exact token's column in its row, and a row's first column, are int32."""


class KVSink(Strict):
    """A sink that the cache keeps: a token id, a position of the row (padding not counted), or an id at a position."""

    token_id: int | None
    position: int | None


class MassiveCarriers(Strict):
    """How the sinks of a prompt show themselves in it (KVSink 2508.04257): after block `layer`, the tokens with
    |h| >= `threshold` in one of `channels` carry a massive activation."""

    layer: int
    channels: list[int]
    thresholds: list[float]


class KVLayer(Strict):
    """Bits of one layer, one number per KV head; 16 leaves a head as it is.

    `packed` is false where the layer keeps transformers' own cache: it holds no keys, or a sliding window so short
    that nothing in it could be packed. `key_dim` and `value_dim` are channels per head. Blocks that a `sliding_window`
    has left behind are dropped; what the layer attends to is not changed.
    """

    packed: bool
    key_bits: list[int]
    value_bits: list[int]
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    reason: str


class KVCachePlan(Strict):
    """How a KV cache is packed.

    Keys take one scale per channel and `group_size` tokens, values one scale per token and `group_size` channels of
    a head (the whole head where it is smaller). The last `window` tokens (and up to a block more) stay in the
    model's dtype, and so do at most `max_exact` tokens of a row that `exact` picks. Scales and zeros take
    `scale_bits` each. `key_bits` and `value_bits` are those of most layers; `layers` says it per layer and KV head.
    `symmetric` grids store no zero point. `rotate`: codes are of rotated keys, and of rotated values as
    `rotate_values` says (null: alike). `scale_tokens`: codes are of keys of unit length, whose lengths are stored
    beside them. `clip`: whose ranges are cut to where rounding errs least. `rounding` "descent": all codes of a key are
    chosen together. `prefix`: rows that begin with these
    token ids take their keys and values from the unquantized model, and keep them exact beside the `max_exact`
    others. `front`: the first tokens of the prefix, where texts do not bring them along: they must be put in front
    of every row. `evict`: at most so many packed tokens are kept between the exact ones and the window, older ones
    are dropped and the sinks move up; null keeps all. `sliding_sinks`: layers with a sliding window see the exact
    tokens beyond it too, with keys as they were rotated. That changes what the model computes, and it was not
    trained so.
    `bytes` and `bits_per_value` are of one row of `length` tokens with `expected_exact` exact ones and numbers of 16
    bits, averaged over the last `group_size` lengths, because the window breathes by a block.
    """

    key_bits: int
    value_bits: int
    group_size: int = Field(ge=1)
    window: int = Field(ge=0)
    evict: int | None = Field(default=None, ge=0)
    sliding_sinks: bool = False
    symmetric: bool
    scale_bits: KVScaleBits = 16
    rotate: KVRotation
    rotate_values: KVRotation | None = None
    scale_tokens: bool = False
    clip: KVClip = "none"
    rounding: KVRounding = "nearest"
    exact: ExactPolicy
    first_n: int = Field(default=0, ge=0)
    max_exact: int = Field(ge=0)
    prefix: list[int] = Field(default_factory=list)
    front: list[int] = Field(default_factory=list)
    sinks: list[KVSink] = Field(default_factory=list)
    massive: MassiveCarriers | None = None
    layers: list[KVLayer]
    bits_per_value: float
    length: int
    expected_exact: int
    bytes: int
    unquantized_bytes: int
    reason: str

    @property
    def value_rotation(self) -> KVRotation:
        """What values go through."""
        return self.rotate if self.rotate_values is None else self.rotate_values

    def in_words(self) -> str:
        """The section in two sentences."""
        packed = sum(layer.packed for layer in self.layers)
        return (f"KV cache: keys in {self._bits('key')} and values in {self._bits('value')} bits, groups of "
                f"{self.group_size}, {self._recoded()}the last {self.window} tokens in full precision, in {packed} of "
                f"{len(self.layers)} layers; {self.reason}. A row of {self.length:,} tokens weighs {self.bytes:,} "
                f"bytes of {self.unquantized_bytes:,}, {self.bits_per_value:.3g} bits per number.{self._changed()}")

    def _bits(self, kind: str) -> str:
        """Of the heads of all packed layers."""
        found = {bits for layer in self.layers if layer.packed for bits in getattr(layer, f"{kind}_bits")}
        usual = getattr(self, f"{kind}_bits")
        return f"{min(found)} to {max(found)} (most in {usual})" if len(found) > 1 else str(usual)

    def _recoded(self) -> str:
        words = {"hadamard": "Hadamard-rotated", "covariance": "rotated by covariance"}
        parts = [f"{kind} {words[how]}" for kind, how in (("keys", self.rotate), ("values", self.value_rotation))
                 if how != "none"]
        parts += ["keys of unit length"] if self.scale_tokens else []
        parts += [f"ranges of {'keys and values' if self.clip == 'both' else self.clip} cut to the least error"
                  ] if self.clip != "none" else []
        parts += ["codes of a key chosen together"] if self.rounding == "descent" else []
        parts += [] if self.scale_bits == 16 else [f"scales of {self.scale_bits} bits"]
        return "".join(f"{part}, " for part in parts)

    def _changed(self) -> str:
        if not self.sliding_sinks:
            return ""
        sliding = sum(layer.sliding_window is not None for layer in self.layers)
        return (f" This changes what the model computes: {sliding} layers with a sliding window see the exact tokens "
                "beyond it too, for which the model was not trained.")


def packed_tokens(tokens: int, window: int, group_size: int) -> int:
    """How many of `tokens` lie in packed blocks: whole blocks only, never one of the last `window`."""
    return max(0, tokens - window) // group_size * group_size


def kept_blocks(tokens: int, plan: KVCachePlan, sliding_window: int | None) -> int:
    """Packed blocks that are left of a row of `tokens` after eviction, or behind a sliding window."""
    blocks = packed_tokens(tokens, plan.window, plan.group_size) // plan.group_size
    if sliding_window is not None:
        return blocks - min(blocks, passed_blocks(tokens, plan.group_size, sliding_window))
    return blocks if plan.evict is None else min(blocks, plan.evict // plan.group_size)


def passed_blocks(tokens: int, group_size: int, sliding_window: int) -> int:
    """Blocks at the beginning of a row of which the next token sees nothing any more."""
    return max(0, tokens - sliding_window + 1) // group_size


def block_bytes(bits: int, group_size: int, width: int, groups: int, symmetric: bool,
                scale_bits: KVScaleBits = 16) -> int:
    """Bytes of one packed block of `group_size` tokens of one head, `width` channels each: codes, scales and zeros.

    Args:
        groups: number of scales in the block.
    """
    kinds = 1 if symmetric else 2
    ends = 0 if scale_bits == 16 else kinds * SCALE_BYTES
    return group_size * width * bits // 8 + groups * scale_bits // 8 * kinds + ends


def layer_bytes(plan: KVCachePlan, layer: int, tokens: int, exact: int, rows: int = 1, value_bytes: int = 2) -> int:
    """Bytes that one layer holds for `rows` rows.

    Args:
        tokens: length of the cache, padding counted.
        exact: slots of exact tokens per row: the largest number that any row of the batch uses.
        value_bytes: bytes of one number in the model's dtype.
    """
    one = plan.layers[layer]
    if not one.packed:
        return 0
    packed = packed_tokens(tokens, plan.window, plan.group_size)
    total = exact * POSITION_BYTES
    value_groups = plan.group_size * (one.value_dim // value_group(plan.group_size, one.value_dim))
    for key_bits, value_bits in zip(one.key_bits, one.value_bits, strict=True):
        for bits, width, groups, norms in (
                (key_bits, one.key_dim, one.key_dim, plan.group_size if plan.scale_tokens else 0),
                (value_bits, one.value_dim, value_groups, 0)):
            block = (plan.group_size * width * value_bytes if bits == 16 else
                     block_bytes(bits, plan.group_size, width, groups, plan.symmetric, plan.scale_bits)
                     + norms * SCALE_BYTES)
            total += kept_blocks(tokens, plan, one.sliding_window) * block
            total += (tokens - packed + exact) * width * value_bytes
    return rows * total


def cache_bytes(plan: KVCachePlan, tokens: int, exact: int, rows: int = 1, value_bytes: int = 2) -> int:
    """Bytes that the packed layers of a cache hold; see `layer_bytes`. The first column of every row, which padding
    sets, counts once per cache."""
    return rows * POSITION_BYTES + sum(
        layer_bytes(plan, layer, tokens, exact, rows, value_bytes) for layer in range(len(plan.layers)))


def held_tokens(tokens: int, sliding_window: int | None) -> int:
    """How many of `tokens` a layer in 16 bits holds: a sliding window holds one token less than it sees."""
    return tokens if sliding_window is None else min(tokens, sliding_window - 1)


def dense_bytes(plan: KVCachePlan, tokens: int, rows: int = 1, value_bytes: int = 2) -> int:
    """Bytes of the same layers without quantization."""
    return rows * value_bytes * sum(
        held_tokens(tokens, one.sliding_window) * len(one.key_bits) * (one.key_dim + one.value_dim)
        for one in plan.layers if one.packed)


def value_group(group_size: int, width: int) -> int:
    """Channels that share one scale of a value: the group, or the whole head where that is smaller."""
    return min(group_size, width)
