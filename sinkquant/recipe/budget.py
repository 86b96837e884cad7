"""The sections about what a plan may cost, and how it is found out what formats cost."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sinkquant.methods import known_method, method_named
from sinkquant.recipe.section import GroupSize, Section


def _of_one_linear(name: str) -> str:
    if method_named(known_method(name)).needs_unquantized_inputs:
        raise ValueError("a sensitivity is of one linear, all others being unquantized, so that there is nothing of "
                         "earlier blocks to make up for; name another method")
    return name


LIMITS = ("bits", "bytes", "megabytes", "bits_per_parameter", "loss")
"""Keys of a budget that limit it."""
MEGABYTE = 1_000_000
TriedAlone = Annotated[str, AfterValidator(_of_one_linear)]
"""A method that sensitivities can be taken by."""


class Budget(Section):
    """What a plan may cost; at most one of `bits`, `bytes`, `megabytes`, `bits_per_parameter` and `loss`; all null: no
    budget.

    `bits`: average bits per weight of the blocks' linears, scales counted. `bytes`, or `megabytes` (of 1,000,000): of
    the whole checkpoint, and with `context` also of the KV cache of `batch` rows of so many tokens.
    `bits_per_parameter`: bits of the whole checkpoint over the parameters of the model, those that are tied once.
    `loss`: a ceiling of the predicted KL divergence
    from the unquantized model, nats per token, met in the fewest bytes. `engine`: only formats that it loads
    (docs/guides/engines.md; "vllm": by the kernels that most builds have, "vllm-cuda": by any that it has there).
    `solver` "even" raises `weights.bits` evenly until the bytes are spent, the linears that sinks dominate first;
    "sensitivity" solves for the least predicted loss (see `sensitivity`). Null: "even" for a number of bits or bytes
    alone, "sensitivity" for `loss`, or where `context` or an `engine` is named.
    """

    bits: float | None = Field(default=None, gt=2, le=16)
    bytes: int | None = Field(default=None, ge=1)
    megabytes: float | None = Field(default=None, gt=0)
    bits_per_parameter: float | None = Field(default=None, gt=0, le=16)
    loss: float | None = Field(default=None, gt=0)
    context: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    engine: Literal["any", "vllm", "vllm-cuda", "vllm-cpu", "llama.cpp", "transformers", "sinkquant"] = "any"
    solver: Literal["even", "sensitivity"] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if len(self.limits) > 1:
            raise ValueError(f"name one of {', '.join(LIMITS[:-1])} and {LIMITS[-1]}")
        if self.engine != "any" and not self.limited:
            raise ValueError("budget.engine is what a budget is solved for, and there is none; name a limit, or the "
                             "recipe's engine instead")
        if self.context is not None and self.bytes is None and self.megabytes is None:
            raise ValueError("context is for a budget of bytes; name budget.bytes")
        if self.solver == "even" and (self.loss is not None or self.context is not None or self.engine != "any"):
            raise ValueError("the solver 'even' knows bits and bytes of weights only; use 'sensitivity'")
        if self.solver == "sensitivity" and not self.limited:
            raise ValueError(f"the solver 'sensitivity' needs one of {', '.join(LIMITS[:-1])} and {LIMITS[-1]}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are named, one at most."""
        return {key: getattr(self, key) for key in LIMITS if getattr(self, key) is not None}

    @property
    def limited(self) -> bool:
        """Whether there is a budget at all."""
        return bool(self.limits)

    def whole(self, values: int) -> int | None:
        """The limit of the whole checkpoint in bytes; None where it is another limit.

        Args:
            values: numbers in the unquantized checkpoint.
        """
        if self.bytes is not None:
            return self.bytes
        if self.megabytes is not None:
            return _whole(self.megabytes * MEGABYTE)
        return None if self.bits_per_parameter is None else _whole(self.bits_per_parameter * values / 8)

    def in_words(self, size: int, values: int) -> str:
        """So many bytes in what the limit of the whole checkpoint is in, rounded up."""
        if self.bytes is not None:
            return f"{size:,}"
        exact = size / MEGABYTE if self.megabytes is not None else 8 * size / values
        return f"{math.ceil(1000 * exact) / 1000:.15g}"

    @property
    def solved(self) -> bool:
        """Whether the plan is solved for from sensitivities."""
        asked = self.loss is not None or self.context is not None or self.engine != "any"
        return self.limited and (self.solver == "sensitivity" or (self.solver is None and asked))


def _whole(size: float) -> int:
    """Rounded down; a product of floats may lie a hair below the whole number that was meant."""
    return math.floor(size + 1e-4)


class SensitivitySettings(Section):
    """How it is found out what a format costs in a linear: for every number of `bits` and every one of `group_sizes`
    (empty: `weights.group_size`), rounded by every one of `methods` (empty: `weights.method`), on `rows` x `length`
    tokens of the calibration text, by one walk back.

    `measure_rows`: measure every candidate too, by forward passes over so many rows of `measure_length` tokens; 0:
    trust the walk. `score` "diagonal" lets the solver see what tools see that sum over all tokens and channels at once.
    `end_bits`: numbers of bits that the output head and the token embedding are tried in; empty: both stay as
    `weights.lm_head` and `weights.embeddings` say. A budget of the whole checkpoint, or of its loss, then chooses.
    `kv_bits`: numbers of bits that the keys and the values of every KV head are tried in, on `kv_rows` x `kv_length`
    tokens; empty: the KV cache stays as the section `kv_cache` says. A budget of bytes with a `context` then chooses.
    Rows as long as the cache tell most: the errors of all tokens that are read add up.
    `kv_repeated`: bits are chosen as much by what they lose where the second half of those rows repeats the first: a
    few heads look far back for what stood there (RazorAttention 2407.15891), and prose seldom asks them.
    """

    rows: int = Field(default=64, ge=1)
    length: int = Field(default=128, ge=2)
    batch_size: int = Field(default=8, ge=1)
    bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default=[2, 3, 4, 5, 6, 7, 8], min_length=1)
    group_sizes: list[GroupSize] = Field(default_factory=list)
    methods: list[TriedAlone] = Field(default_factory=list)
    measure_rows: int = Field(default=0, ge=0)
    measure_length: int = Field(default=64, ge=2)
    score: Literal["second-order", "diagonal"] = "second-order"
    end_bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default_factory=list)
    kv_bits: list[Literal[1, 2, 3, 4, 8]] = Field(default_factory=list)
    kv_rows: int = Field(default=2, ge=1)
    kv_length: int = Field(default=2048, ge=16)
    kv_repeated: bool = True

    @property
    def kv_batch(self) -> int:
        """Rows of `kv_length` tokens at a time: as many tokens as of the others."""
        return max(1, self.batch_size * self.length // self.kv_length)
