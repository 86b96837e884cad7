"""What every calibration token weighs in the statistics, the same for every method that takes any."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sinkquant.artifacts import Calibration
from sinkquant.models import AttentionRecord, Step
from sinkquant.sinks import SinkSelector

RSQ_FLOOR = 0.005
"""What the token that receives the least attention weighs, the one with the most weighing 1 (2503.01820)."""


@dataclass
class TokenWeights:
    """The weight of every token under the calibration's policy.

    "all": 1. "boost": a sink weighs its selector's weight, any other token 1. "cap": a sink whose input to a linear is
    larger than the mean of its batch (for experts: of all tokens that the expert is shown) weighs so much less that it
    is as large. "exclude": sinks weigh nothing. "attention": a token weighs the attention that it receives in the layer
    at hand, the row's least and most taken to 0.005 and 1 (RSQ, Sung et al. 2503.01820).

    rows: int64 [rows, length], the calibration rows. front: how many tokens stand before what places of sinks are
    counted from: "cap" and "exclude" treat them as sinks too.
    """

    rows: torch.Tensor
    calibration: Calibration
    front: int = 0
    sinks: torch.Tensor = field(init=False)
    weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sinks = torch.zeros(self.rows.shape, dtype=torch.bool)
        boosted = torch.ones(self.rows.shape, dtype=torch.float32)
        places = (torch.arange(self.rows.shape[1]) - self.front).expand(self.rows.shape)
        for sink in self.calibration.sinks:
            here = SinkSelector.of([sink]).mask(self.rows, places)
            # A token that several selectors name takes the largest weight.
            boosted = torch.where(here, torch.maximum(boosted, torch.tensor(sink.weight)), boosted)
            self.sinks |= here
        self.sinks[:, :self.front] = True
        policy = self.calibration.statistics
        self.weights = torch.ones_like(boosted)
        if policy == "boost":
            self.weights = boosted
        elif policy == "exclude":
            self.weights[self.sinks] = 0

    @property
    def capped(self) -> bool:
        """Whether what a token weighs depends on what it feeds to the linear at hand."""
        return self.calibration.statistics == "cap"

    def enter(self, step: Step) -> None:
        """Get ready for a block: "attention" replays the rows once to see what every token receives in it."""
        if self.calibration.statistics == "attention":
            observer = _Received(step, torch.zeros(self.rows.shape))
            step.walk.observers.append(observer)
            try:
                step.run()
            finally:
                step.walk.observers.remove(observer)
            self.weights = _scaled(observer.received)

    def of(self, step: Step, inputs: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens of the batch that the step replays, float32 [tokens] on the inputs' device.

        Tokens that a router sends to an expert that is a linear of its own weigh 1 each, since their places are not
        known.

        Args:
            inputs: [tokens, columns], what the tokens feed to the linear at hand.
        """
        weights = self.weights[step.batch].flatten()
        if len(weights) != len(inputs):
            return torch.ones(len(inputs), device=inputs.device)
        return self.on(inputs, weights, self.sinks[step.batch].flatten())

    def on(self, inputs: torch.Tensor, weights: torch.Tensor, sinks: torch.Tensor,
           mean: float | None = None) -> torch.Tensor:
        """Weights of some tokens, float32 [tokens] on the inputs' device.

        Args:
            inputs: [tokens, columns]. weights, sinks: [tokens], what of `self.weights` and `self.sinks` is theirs.
            mean: squared norm that sinks are capped at; None for that of the mean of these tokens.
        """
        weights, sinks = weights.to(inputs.device), sinks.to(inputs.device)
        if self.capped:
            energy = inputs.float().square().sum(1)
            capped = ((energy.mean() if mean is None else mean) / energy.clamp(min=1e-30)).clamp(max=1.0)
            return torch.where(sinks, capped, weights)
        return weights


@dataclass
class _Received:
    """Sums up the attention that every position receives over the heads of a block."""

    step: Step
    received: torch.Tensor

    def attention(self, record: AttentionRecord) -> None:
        self.received[self.step.batch] += record.received.sum(1).cpu()


def _scaled(received: torch.Tensor) -> torch.Tensor:
    """RSQ's weights from the attention received, both [rows, length]."""
    least, most = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    return RSQ_FLOOR + (1 - RSQ_FLOOR) * (received - least) / (most - least).clamp(min=1e-30)
