"""Massive activations: which channels of the residual stream a few tokens carry, where they are born and end."""

from __future__ import annotations

import torch

from sinkquant.artifacts import OutlierChannel
from sinkquant.detect.residual import ResidualStream
from sinkquant.recipe import Detection

EXCEPTION = 4.0
"""A massive token's norm, and its value in the channel, are at least so many times the median token's: else, others are
as large there. The null: over five random models of each of thirteen families no token's norm passes 2.4 times."""


class MassiveChannel:
    """A channel in which a few tokens are massive.

    Attributes:
        peak: the largest |h| anywhere. ratio: the largest |h| over the median of a boundary that attention reads.
        born, ended: the sub-blocks with the largest rise and fall of the channel's maximum (2603.05498).
        carriers: bool [rows, length], the massive tokens with at least half of the channel's largest value, at the
            boundary where its ratio is largest.
    """

    def __init__(self, channel: int, ratio: float, carriers: torch.Tensor, stream: ResidualStream) -> None:
        profile = torch.stack([maximum[channel] for maximum in stream.maximum])
        self.channel, self.ratio, self.carriers = channel, ratio, carriers
        self.profile = profile.tolist()
        self.peak = float(profile.max())
        change = torch.diff(profile, prepend=torch.zeros(1))
        self.born = stream.names[int(change.argmax())]
        top = int(profile.argmax())
        later = change[top + 1:]
        fall = top + 1 + int(later.argmin()) if len(later) else top
        self.ended = stream.names[fall] if profile[-1] < 0.5 * self.peak else None


def massive_channels(stream: ResidualStream, rows: torch.Tensor, settings: Detection) -> list[MassiveChannel]:
    """The channels with massive activations, largest peak first.

    Published (Sun et al. 2402.17762): |h| over 100 and about 1,000 times the median, in few tokens. So that it holds
    for small models as well, it is measured without a scale, at the boundary that the attention of a later block reads
    where the channel's ratio to the median is largest: that ratio is at least `settings.massive_ratio`; the channel is
    among a token's `TOP` largest; the token's value in it, and its norm, are at least `EXCEPTION` times the median
    token's; and few tokens are like that. The null of the ratio: over five random models of each of thirteen families
    the largest is 10.5, where the threshold is 50.

    Args:
        rows: int64 [rows, length], the rows that `stream` watched.
    """
    read = stream.read
    ratios = torch.stack([stream.ratio(i) for i in read])
    found = []
    for channel in torch.nonzero(ratios.amax(0) >= settings.massive_ratio).flatten().tolist():
        boundary = read[int(ratios[:, channel].argmax())]
        carriers = _carriers(stream, boundary, channel)
        if carriers.any() and min(float(carriers.float().mean()),
                                  _share_of_ids(carriers, rows)) <= settings.massive_token_share:
            found.append(MassiveChannel(channel, float(ratios[:, channel].max()), carriers, stream))
    return sorted(found, key=lambda c: (-c.peak, c.channel))


def outlier_channels(stream: ResidualStream, massive: set[int], settings: Detection) -> list[OutlierChannel]:
    """Channels that pass `settings.massive_ratio` times the median of a boundary without any massive activation: many
    tokens carry them, or tokens that are no larger than others, or no later attention reads them. Most tokens first.

    Args:
        massive: the channels with massive activations, which are left out.
    """
    carried: dict[int, dict[int, float]] = {}
    for boundary in range(len(stream.names)):
        over = stream.top_values[boundary] >= settings.massive_ratio * max(stream.median[boundary], 1e-30)
        channels, counts = stream.top_channels[boundary][over].unique(return_counts=True)
        for channel, count in zip(channels.tolist(), counts.tolist(), strict=True):
            if channel not in massive:
                carried.setdefault(channel, {})[boundary] = count / over[..., 0].numel()
    return sorted((OutlierChannel(
        channel=channel, peak=max(float(maximum[channel]) for maximum in stream.maximum),
        ratio=max(float(stream.ratio(i)[channel]) for i in shares), share=max(shares.values()),
        first=stream.names[min(shares)], last=stream.names[max(shares)]) for channel, shares in carried.items()),
        key=lambda c: (-c.share, c.channel))


def _carriers(stream: ResidualStream, boundary: int, channel: int) -> torch.Tensor:
    """bool [rows, length]: tokens far larger than the others that hold at least half of a channel's largest value."""
    norms, values = stream.norms[boundary], stream.top_values[boundary]
    least = max(0.5 * float(stream.maximum[boundary][channel]), EXCEPTION * float(stream.typical[boundary][channel]))
    here = (stream.top_channels[boundary] == channel) & (values >= least)
    return here.any(-1) & (norms >= EXCEPTION * norms.median().clamp(min=1e-30))


def _share_of_ids(marked: torch.Tensor, rows: torch.Tensor) -> float:
    """The share of token ids most of whose occurrences are marked."""
    ids, inverse = rows.unique(return_inverse=True)
    inside = torch.bincount(inverse.flatten(), weights=marked.flatten().double(), minlength=len(ids))
    return float((inside >= 0.5 * torch.bincount(inverse.flatten(), minlength=len(ids))).double().mean())
