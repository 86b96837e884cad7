"""The channels of the residual stream that stand out: massive activations, and outliers that are none."""

from __future__ import annotations

from typing import Any

import torch

from sinkquant.artifacts import Channel
from sinkquant.detect.detector import Detector, Found, text_of
from sinkquant.detect.massive import MassiveChannel, outlier_channels

CARRIERS_SHOWN = 10


class Channels(Detector):
    """Channels in which a few tokens are massive, with the labels of these, and those that pass the ratio otherwise."""

    fields = ("channels", "outlier_channels", "depth")
    null = "over five random models of each of thirteen families the largest ratio is 10.5 and the largest norm 2.4"

    def result(self, found: Found) -> dict[str, Any]:
        """Of all surveys, each channel once."""
        channels: dict[int, MassiveChannel] = {}
        labels: dict[int, list[str]] = {}
        for survey, massive in zip(found.surveys, found.massive, strict=True):
            for channel in massive:
                channels.setdefault(channel.channel, channel)
                known = labels.setdefault(channel.channel, [])
                known += [label for label in _labels(channel, survey.rows, found) if label not in known]
        outliers = {one.channel: one for survey in found.surveys[::-1]
                    for one in outlier_channels(survey.stream, set(channels), self.settings)}
        return {"channels": [Channel(channel=one.channel, peak=one.peak, ratio=one.ratio, born=one.born,
                                     ended=one.ended, tokens=labels[one.channel][:CARRIERS_SHOWN], profile=one.profile)
                             for one in channels.values()],
                "outlier_channels": sorted(outliers.values(), key=lambda one: (-one.share, one.channel)),
                "depth": found.surveys[0].stream.names}


def _labels(channel: MassiveChannel, rows: torch.Tensor, found: Found) -> list[str]:
    """The tokens that carry a channel: sinks first, the first position whatever stands there, then ids."""
    rest, labels = channel.carriers.clone(), []
    for sink in found.sinks.each():
        here = sink.mask(rows)
        if (rest & here).any():
            ((token_id, position),) = sink.sinks
            labels.append(f"position {position}" if token_id is None else str(text_of(token_id, found.tokenizer)))
            rest &= ~here
    if rest[:, 0].any():
        labels.append("position 0")
        rest[:, 0] = False
    ids, counts = rows[rest].unique(return_counts=True)
    return labels + [str(text_of(int(ids[i]), found.tokenizer)) for i in counts.argsort(descending=True, stable=True)]
