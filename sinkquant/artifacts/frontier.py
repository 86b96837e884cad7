"""Frontier: predicted loss against bytes, for solved plans, for uniform ones, and for the control."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict


class FrontierPoint(Strict):
    """One plan. `bits_per_weight` averages over the linears of the blocks, scales counted; `bytes` are those of the
    checkpoint, and of the KV cache where the budget counts it. `kl` and `kl_sinks` are predicted, nats per token; `kl`
    holds the cache's part where the budget counts the cache and its heads have sensitivities."""

    name: str
    kind: Literal["solved", "uniform", "control", "asked"]
    bits_per_weight: float
    bytes: int
    kl: float
    kl_sinks: float


class Frontier(Artifact):
    """A sweep of budgets. `solved` points are the least predicted loss for their bytes, exactly."""

    schema_: Literal["sinkquant/frontier@1"] = Field(default="sinkquant/frontier@1", alias="schema")
    model: str
    recipe: str
    kv_bytes: int = 0
    points: list[FrontierPoint]
    notes: list[str] = Field(default_factory=list)
