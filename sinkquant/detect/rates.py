"""Sink rates by Gu et al. (2410.10781), beside their negative control and without `<bos>`."""

from __future__ import annotations

from typing import Any

from sinkquant.detect.detector import Detector, Found
from sinkquant.detect.table import AttentionTable

PUBLISHED_THRESHOLDS = ("0.1", "0.3", "0.8")


class Rates(Detector):
    """The share of samples, layers and heads that give the first position more than a threshold."""

    fields = ("sink_rate", "sink_rate_repeated_token", "sink_rate_without_bos")
    null = "rows that repeat one token, without <bos>: sink_rate_repeated_token"

    def result(self, found: Found) -> dict[str, Any]:
        """One rate for every published threshold."""
        bare = found.without_bos
        return {"sink_rate": _rates(found.surveys[0].table), "sink_rate_repeated_token": _rates(found.repeated.table),
                "sink_rate_without_bos": None if bare is None else _rates(bare.table)}


def _rates(table: AttentionTable) -> dict[str, float]:
    return {threshold: table.sink_rate(float(threshold)) for threshold in PUBLISHED_THRESHOLDS}
