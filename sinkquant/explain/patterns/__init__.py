"""Ways in which one matrix is wrong: what is recognised in the numbers is confirmed by putting nothing but it right."""

from collections.abc import Callable, Iterator

from sinkquant.explain.patterns.finding import Evidence, Finding
from sinkquant.explain.patterns.order import moved, rotated
from sinkquant.explain.patterns.scales import outlier_scales, wrong_scales
from sinkquant.explain.patterns.weights import few_columns, single_weights

Pattern = Callable[[Evidence], Iterator[Finding]]
PATTERNS: tuple[Pattern, ...] = (rotated, moved, single_weights, few_columns, wrong_scales, outlier_scales)


def findings(evidence: Evidence) -> Iterator[Finding]:
    """What may be wrong with a matrix."""
    for pattern in PATTERNS:
        yield from pattern(evidence)
