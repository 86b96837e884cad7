"""A model that is measured, and the pairs that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan, Measure
from sinkquant.artifacts.report import PositionLoss
from sinkquant.evaluate.statistics import Samples

BASELINE = "unquantized"
DECIDED = (("control", "sink_aware"), ("pruned_control", "pruned"), ("weights_control", "weights"),
           ("cache_control", "cache"))
"""Pairs whose difference in divergence is a verdict."""
PAIRS = (*DECIDED, ("sink_aware", BASELINE), ("control", BASELINE), ("quantized", BASELINE))


@dataclass
class Candidate:
    """A model to be measured: loaded when its turn comes, and once for all candidates that name the same `load`.

    `load`: makes the model anew. Its parameters that equal the first candidate's share their memory from then on, so
    that a model which is trained or changed afterwards is to be given as a copy.
    `kv`: the KV cache that it is read through, null for an unquantized one; `activations`: what inputs are rounded to.
    `tasks_too`: whether tasks are run, or the divergence alone. `tasks`, `divergences` (nats per token, one per row)
    `by_position` (the same over bins of positions, per row) and `continued` (over a continuation through the cache) are
    filled by `evaluate`.
    """

    name: str
    path: str
    load: Callable[[], PreTrainedModel]
    weight_bytes: int
    bits_per_weight: float
    kv: KVCachePlan | None = None
    activations: str = "16-bit"
    tasks_too: bool = True
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)
    by_position: list[list[float]] = field(default_factory=list)
    continued: list[PositionLoss] = field(default_factory=list)

    def unmeasured(self, **changes: Any) -> Candidate:
        """The same with other fields and nothing measured yet."""
        return replace(self, tasks={}, divergences=[], by_position=[], continued=[], **changes)


@dataclass(frozen=True)
class TaskResult:
    """One task of one model.

    Attributes:
        measures: metric -> value and standard error. Metrics behind a filter of lm-eval are named "metric,filter".
        samples: metric -> (numerators, denominators) per document, for paired statistics; metrics that are not a
            function of the ratio of their sums have none.
        higher_is_better: by metric.
        documents: how many were scored.
    """

    measures: dict[str, Measure]
    samples: dict[str, Samples]
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    documents: int = 0
