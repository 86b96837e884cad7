"""Plans beside one another. Frontier: predicted loss against bytes, for solved plans, for uniform ones, and for the
control. PlanDifference: what two plans of one model decide differently, and what each decision weighs and loses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.plan import PredictedLoss


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


class PlanSummary(Strict):
    """One plan as a whole. `kl` and `kl_sinks`: its predicted loss in nats per token, null where nothing is known of
    it; `kv_bytes`: the cache of one row at the plan's length, null where the cache is left alone."""

    path: str
    name: str
    weight_bytes: int
    bits_per_weight: float
    kl: float | None = None
    kl_sinks: float | None = None
    kv_bytes: int | None = None
    loads_in: list[str]


class ModuleChange(Strict):
    """A linear on which the plans differ.

    `changed`: field of the decision -> its value in a and in b. `bytes`: in a and in b. `losses`: what the unit that it
    shares a format with is predicted to lose in a and in b; null where that is not known. `reasons`: why, in a and b.
    """

    module: str
    changed: dict[str, tuple[Any, Any]]
    bytes: tuple[int, int]
    losses: tuple[PredictedLoss | None, PredictedLoss | None]
    reasons: tuple[str, str]


class PlanDifference(Artifact):
    """Plan a against plan b. `settings`: everything that is not of one linear (transforms, calibration, KV cache, seed)
    by its path, with its value in a and in b; `same`: how many linears they agree on."""

    schema_: Literal["sinkquant/difference@1"] = Field(default="sinkquant/difference@1", alias="schema")
    a: PlanSummary
    b: PlanSummary
    modules: list[ModuleChange]
    same: int
    settings: dict[str, tuple[Any, Any]]
