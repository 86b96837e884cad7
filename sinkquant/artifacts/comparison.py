"""Comparison: checkpoints of any format beside one unquantized model, and what could be told apart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.report import Measure, PositionLoss


class Interval(Strict):
    """A figure with its 95 % interval over the rows of text."""

    value: float
    low: float
    high: float


class ComparedRow(Strict):
    """One model. `kind` is "baseline", "checkpoint", or "floor": the baseline computed in another way.

    `bytes` are those of the tensors' files; `bits_per_weight`: eight times that over the baseline's parameters, all of
    them, so that it means the same for every format. `kl` and its quantiles over tokens are nats, from the baseline;
    `same_top`: the share of tokens where both think the same token likeliest. `perplexity` is per token;
    `perplexity_ratio`: over the baseline's on the same rows, which is known far better than either.
    `sinks`: the verdict of sink fidelity, null where it was not asked. `pareto`: no other checkpoint is as small and
    as close. `loss_shown`: the next token's loss differs from the baseline's, its interval lies on one side of zero.
    """

    name: str
    path: str
    kind: Literal["baseline", "checkpoint", "floor"]
    format: str
    bytes: int
    bits_per_weight: float
    kv_bits: float = 16.0
    kl: Interval | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_99_9: float | None = None
    kl_by_position: list[PositionLoss] = Field(default_factory=list)
    same_top: Interval | None = None
    perplexity: Interval
    perplexity_ratio: Interval | None = None
    tasks: dict[str, dict[str, Measure]] = Field(default_factory=dict)
    sinks: str | None = None
    sinks_sentence: str | None = None
    pareto: bool = False
    loss_shown: bool | None = None

    @property
    def mean_kl(self) -> float:
        """Nats per token from the baseline, of a row that has them."""
        assert self.kl is not None
        return self.kl.value


class ComparedPair(Strict):
    """The divergence of `a` minus that of `b`, paired over rows, nats per token; 95 % interval."""

    a: str
    b: str
    difference: Interval


class Comparison(Artifact):
    """All rows: the baseline, then checkpoints by size, then the noise floor. `pairs`: checkpoints that are neighbours
    by divergence."""

    schema_: Literal["sinkquant/comparison@1"] = Field(default="sinkquant/comparison@1", alias="schema")
    model: str
    rows: list[ComparedRow]
    pairs: list[ComparedPair] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    facts: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
