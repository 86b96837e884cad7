"""Detectors fill the sink map: every field once, each with what the same measure gives where nothing is."""

from __future__ import annotations

from sinkquant.artifacts import SinkMap
from sinkquant.detect.detectors import BUILT_IN

NOT_DETECTED = {"schema_", "model", "tokenization", "thresholds", "notes", "nulls", "extensions", "shape"}


def test_every_field_of_the_sink_map_is_one_detectors() -> None:
    filled = [field for one in BUILT_IN for field in one.fields]
    assert len(filled) == len(set(filled))
    assert set(filled) == set(SinkMap.model_fields) - NOT_DETECTED
    assert all(one.null for one in BUILT_IN)
