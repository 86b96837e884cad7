"""The section about the KV cache."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sinkquant.artifacts.kv import KVBits, KVClip, KVRotation, KVRounding, KVScaleBits
from sinkquant.recipe.section import Section

FIRST_N = 4
"""Tokens that `exact` "first-n" keeps where no number is named."""


class KVOverride(Section):
    """Bits of their own for the KV heads `heads` (null: all) of the layers `layers`; 16 leaves them as they are."""

    layers: list[int] = Field(min_length=1)
    heads: list[int] | None = None
    key_bits: KVBits | None = None
    value_bits: KVBits | None = None


class KVCache(Section):
    """How the KV cache is packed, and which tokens of a prompt stay exact in it.

    `bits`: so many per number at most for a row of `length` tokens, scales, window and exact tokens counted; group and
    window are chosen for it, and every head's bits by what they were measured to lose (`sensitivity.kv_bits`; 2, 3,
    4 and 8 where it is empty). `key_bits` and `value_bits` do not count then.
    Groups of `group_size`: tokens for keys, channels of a head for values; null: the smallest of 32, 64 and 128 that
    fits. `scale_bits`: of scales and zeros. The last `window` tokens are never packed.
    `exact`: the sinks that detection found; "first-n": the first `first_n` tokens; "massive": those that carry a
    massive activation in the prompt at hand; "none". At most `max_exact` per row. `prefix` "bos": keys and values
    of `<bos>` come from the unquantized model; "found": those of the outlier tokens that detection found and `<bos>`,
    which are put in front of every row. `evict`: at most so many packed tokens are kept, older ones are dropped;
    the exact ones and the window stay, so that an endless stream runs in fixed memory. `sliding_sinks`: layers with a
    sliding window see the exact tokens beyond it too, which changes what the model computes. `length` is what bytes are
    planned for.
    `rotate`: channels of every head are mixed before they are packed, and attention stays what it was: "hadamard"
    (QuaRot 2404.00456) spreads outliers; "covariance" balances each head's keys with its queries, and evens out its
    values, by matrices found on calibration text. `rotate_values`: the same for values; null: as `rotate`.
    `scale_tokens`: keys are packed at unit length, their lengths beside them (OScaR 2605.19660). `clip` "keys",
    "values" or "both": ranges are cut to where rounding errs least, sinks left out, and shrink nothing. `rounding`
    "descent": all codes of a key are chosen together for what queries read of it; with `rotate` "covariance" alone.
    """

    bits: float | None = Field(default=None, gt=1, le=16)
    key_bits: KVBits = 2
    value_bits: KVBits = 2
    group_size: Literal[32, 64, 128] | None = None
    window: int = Field(default=128, ge=0)
    evict: int | None = Field(default=None, ge=0)
    sliding_sinks: bool = False
    symmetric: bool = False
    scale_bits: KVScaleBits = 8
    rotate: KVRotation = "none"
    rotate_values: KVRotation | None = None
    scale_tokens: bool = False
    clip: KVClip = "none"
    rounding: KVRounding = "nearest"
    exact: Literal["none", "first-n", "detected", "massive"] = "detected"
    first_n: int = Field(default=FIRST_N, ge=1)
    max_exact: int = Field(default=16, ge=0)
    prefix: Literal["none", "bos", "found"] = "none"
    length: int = Field(default=4096, ge=1)
    overrides: list[KVOverride] = Field(default_factory=list)

    @model_validator(mode="after")
    def _first_tokens(self) -> Self:
        if self.exact != "first-n" and self.first_n != FIRST_N:
            raise ValueError(f"first_n says how many tokens exact 'first-n' keeps, and exact is {self.exact!r}; set it "
                             f"to 'first-n', or leave first_n at {FIRST_N}")
        return self


class KVCacheScheme(Section):
    """What serving engines hold the KV cache in, as the checkpoint tells them: FP8 with scales from calibration, which
    vLLM reads and plain transformers simulates.

    `strategy` "tensor": one scale for the keys of a layer and one for its values; "attn_head": one for every KV head.
    `sinks` "exclude": the ranges are those of all tokens but the sinks, which saturate.
    """

    format: Literal["fp8"] = "fp8"
    strategy: Literal["tensor", "attn_head"] = "tensor"
    sinks: Literal["all", "exclude"] = "all"
