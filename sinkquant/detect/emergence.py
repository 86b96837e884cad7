"""The block in which massive activations emerge (2605.08504): one layer makes them, the stream carries them on.

Measured by norms, so that no channel has to be known: what the massive tokens weigh over the median token, boundary by
boundary, and where it rises most. The null are the other tokens of the same rows.
"""

from __future__ import annotations

from typing import Any

import torch

from sinkquant.artifacts import Emergence
from sinkquant.detect.detector import Detector, Found
from sinkquant.detect.residual import ResidualStream


class EmergenceBlock(Detector):
    """Where the norm of the massive tokens rises most."""

    fields = ("emergence",)
    null = "the largest rise of any token that is not massive, in the same rows"

    def result(self, found: Found) -> dict[str, Any]:
        """Of the first rows that hold massive tokens; None where there are none, or where others rise as much."""
        for index, survey in enumerate(found.surveys):
            if found.massive[index]:
                return {"emergence": emergence(survey.stream, found.carriers(index))}
        return {"emergence": None}


def emergence(stream: ResidualStream, massive: torch.Tensor) -> Emergence | None:
    """The sub-block in which massive tokens emerge.

    Args:
        massive: bool [rows, length].
    """
    norms = torch.stack(stream.norms)
    norms = norms / norms.flatten(1).median(dim=1).values.clamp(min=1e-30)[:, None, None]
    rises = torch.diff(norms, dim=0)[:len(stream.read) - 1]
    if not len(rises):  # one block alone reads the stream, before anything could rise
        return None
    mean = rises[:, massive].mean(1)
    place = int(mean.argmax())
    null = float(rises[:, ~massive].max()) if not massive.all() else 0.0
    if float(mean[place]) <= null:
        return None
    after = norms[place + 1][massive].mean()
    return Emergence(place=stream.names[place + 1], block=int(stream.names[place + 1].split(".")[1]),
                     rise=float(mean[place]), norm=float(after), null=null)
