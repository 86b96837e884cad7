"""The residual stream at every sub-block boundary: how large channels and tokens get there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sinkquant.detect.middle import Middle, find_middle, watched
from sinkquant.models import Step

TOP = 4
"""Channels remembered per token: more than one, since a token may carry several massive channels. No published model
has more (Sun et al. 2402.17762, table 1)."""
PIECE = 1 << 20
"""Values that are looked at at a time."""
SAMPLE = 1 << 16
"""Values of a batch that its median is taken of: within 1 % of that of all."""


class ResidualStream:
    """Watches the residual stream at every sub-block boundary of a walk.

    Attributes (lists over boundaries, the embedding first):
        names: "embedding", "layers.0.attention", "layers.0.mlp", ...; "layers.0" where a block is not divided.
        maximum: [hidden_size], largest |h| of every channel. median: median |h| of the boundary.
        typical: [hidden_size], the median token's |h| in every channel. norms: [rows, length], the norm of every token.
        top_values, top_channels: [rows, length, TOP], every token's largest channels.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.maximum: list[torch.Tensor] = []
        self.median: list[float] = []
        self.typical: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.top_values: list[torch.Tensor] = []
        self.top_channels: list[torch.Tensor] = []

    def add(self, name: str, states: Iterable[torch.Tensor]) -> None:
        """One boundary: hidden states of all rows, as batches of [rows, length, hidden_size]."""
        boundary = _Boundary()
        for state in states:
            boundary.add(state)
        self._close(name, boundary)

    def _close(self, name: str, boundary: _Boundary) -> None:
        self.names.append(name)
        self.maximum.append(torch.stack(boundary.maximum).amax(0))
        self.median.append(float(torch.tensor(boundary.median).mean()))
        self.typical.append(torch.stack(boundary.typical).median(0).values)
        self.norms.append(torch.cat(boundary.norms))
        self.top_values.append(torch.cat(boundary.top_values))
        self.top_channels.append(torch.cat(boundary.top_channels))

    def ratio(self, boundary: int) -> torch.Tensor:
        """[hidden_size], largest |h| of every channel over the boundary's median |h|."""
        return self.maximum[boundary] / max(self.median[boundary], 1e-30)

    @property
    def read(self) -> list[int]:
        """The boundaries that the attention of a later block reads: all but those in and after the last block."""
        last = self.names[-1].split(".")[:2]
        return [i for i, name in enumerate(self.names) if name == "embedding" or name.split(".")[:2] != last]

    def run(self, step: Step, middle: Middle | None = None, search: bool = True) -> None:
        """Run a step of the walk and record the boundaries in and after its block.

        Args:
            middle: where the block shows the stream between its sub-blocks, where that was found already.
            search: look for it where it is not given, which runs the block on a row of its own.
        """
        if step.index == 0:
            self.add("embedding", [step.walk.hidden])
        if middle is None and search:
            middle = find_middle(step)
        between = _Boundary()
        with watched(middle, between.add, step.walk.hidden.shape[1:]):
            outputs = step.run()
        if middle is not None:
            self._close(f"layers.{step.index}.attention", between)
        self.add(f"layers.{step.index}.mlp" if middle is not None else f"layers.{step.index}", [outputs])


class _Boundary:
    """What is kept of the batches of one boundary; the hidden states themselves are not."""

    def __init__(self) -> None:
        self.maximum: list[torch.Tensor] = []
        self.median: list[float] = []
        self.typical: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.top_values: list[torch.Tensor] = []
        self.top_channels: list[torch.Tensor] = []

    def add(self, states: torch.Tensor) -> None:
        """states: [rows, length, hidden_size]."""
        for part in states.split(max(1, PIECE // states[0].numel())):
            magnitudes = part.abs().float()
            self.maximum.append(magnitudes.amax(dim=(0, 1)).cpu())
            self.norms.append(torch.linalg.vector_norm(magnitudes, dim=-1).cpu())
            top = magnitudes.topk(min(TOP, part.shape[-1]), dim=-1)
            self.top_values.append(top.values.cpu())
            self.top_channels.append(top.indices.cpu())
        some = sampled(states).abs().float()
        self.median.append(float(some.median()))
        self.typical.append(some.median(dim=0).values.cpu())


def sampled(values: torch.Tensor) -> torch.Tensor:
    """Every n-th token of [rows, length, channels], about `SAMPLE` values; n is odd, so that rows of a length that is a
    power of two give all of their positions."""
    tokens = values.flatten(0, -2)
    return tokens[::values.numel() // SAMPLE | 1]
