"""Residual sinks: fixed channels of the residual stream that are large for most tokens (2601.22966).

A massive activation is an exception of few tokens; a residual sink is in nearly all of them, all the way through the
model, and rescales the other channels through the norms. Both may lie in one channel.
"""

from __future__ import annotations

from typing import Any

import torch

from sinkquant.artifacts import ResidualSink
from sinkquant.detect.detector import Detector, Found
from sinkquant.detect.residual import ResidualStream

LARGE = 5.0
"""The median token's |h| in the channel, over the median |h| of the boundary."""


class ResidualSinks(Detector):
    """Channels in which the median token is large at half of the boundaries or more."""

    fields = ("residual_sinks",)
    null = "over five random models of each of thirteen families no channel passes 2.6, where the threshold is 5"

    def result(self, found: Found) -> dict[str, Any]:
        """The channels, largest first, as the first rows show them."""
        return {"residual_sinks": residual_sinks(found.surveys[0].stream)}


def residual_sinks(stream: ResidualStream) -> list[ResidualSink]:
    """The residual sinks of a stream. `null` of each is what the largest of the other channels reaches."""
    ratios = torch.stack([typical / max(median, 1e-30)
                          for typical, median in zip(stream.typical, stream.median, strict=True)])
    lasting = ratios.median(dim=0).values
    large = lasting >= LARGE
    null = float(lasting[~large].max()) if not large.all() else 0.0
    return sorted((ResidualSink(channel=c, ratio=float(lasting[c]), largest_ratio=float(ratios[:, c].max()), null=null)
                   for c in torch.nonzero(large).flatten().tolist()), key=lambda sink: -sink.ratio)
