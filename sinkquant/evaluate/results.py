"""What one task says about one model."""

from __future__ import annotations

from dataclasses import dataclass, field

from sinkquant.artifacts import Measure
from sinkquant.evaluate.statistics import Samples


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
