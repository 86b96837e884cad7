"""Massive activations: where in the residual stream they are born, how large they get, who carries them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sinkquant.models import Step
from sinkquant.recipe import Detection

TOP = 4
"""Channels remembered per token: more than one, since a token may carry several massive channels."""


class ResidualStream:
    """Watches the residual stream at every sub-block boundary of a walk.

    Attributes (lists over boundaries, the embedding first):
        names: "embedding", "layers.0.attention", "layers.0.mlp", ...; "layers.0" where a block is not divided.
        maximum: [hidden_size], largest |h| of every channel. median: median |h| of the boundary.
        top_values, top_channels: [rows, length, TOP], every token's largest channels.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.maximum: list[torch.Tensor] = []
        self.median: list[float] = []
        self.top_values: list[torch.Tensor] = []
        self.top_channels: list[torch.Tensor] = []

    def add(self, name: str, states: list[torch.Tensor]) -> None:
        """One boundary: hidden states of all rows, as batches of [rows, length, hidden_size]."""
        magnitudes = [state.abs().float() for state in states]
        self.names.append(name)
        self.maximum.append(torch.stack([m.amax(dim=(0, 1)) for m in magnitudes]).amax(0).cpu())
        self.median.append(float(torch.stack([m.median() for m in magnitudes]).mean()))
        top = [m.topk(min(TOP, m.shape[-1]), dim=-1) for m in magnitudes]
        self.top_values.append(torch.cat([t.values for t in top]).cpu())
        self.top_channels.append(torch.cat([t.indices for t in top]).cpu())

    def ratio(self, boundary: int) -> torch.Tensor:
        """[hidden_size], largest |h| of every channel over the boundary's median |h|."""
        return self.maximum[boundary] / max(self.median[boundary], 1e-30)

    def run(self, step: Step) -> None:
        """Run a step of the walk and record the boundaries in and after its block."""
        if step.index == 0:
            self.add("embedding", [step.walk.hidden])
        middle = find_middle(step)
        with recorded_input(middle) as recorded:
            outputs = step.run()
        # Some blocks flatten rows and positions between their sub-blocks (OPT).
        states = [state.reshape(-1, *outputs.shape[1:]) for state in recorded]
        if states:
            self.add(f"layers.{step.index}.attention", states)
        self.add(f"layers.{step.index}.mlp" if states else f"layers.{step.index}", [outputs])


class MassiveChannel:
    """A channel that a few tokens carry at `settings.massive_ratio` times the median of a boundary or more.

    Attributes:
        carriers: bool [rows, length], the tokens with at least half of the channel's maximum at its peak boundary.
    """

    def __init__(self, channel: int, stream: ResidualStream) -> None:
        profile = torch.stack([maximum[channel] for maximum in stream.maximum])
        ratios = torch.stack([stream.ratio(i)[channel] for i in range(len(stream.names))])
        self.channel = channel
        self.profile = profile.tolist()
        self.peak = float(profile.max())
        self.ratio = float(ratios.max())
        boundary = int(profile.argmax())
        change = torch.diff(profile, prepend=torch.zeros(1))
        self.born = stream.names[int(change.argmax())]
        later = change[boundary + 1:]
        fall = boundary + 1 + int(later.argmin()) if len(later) else boundary
        self.ended = stream.names[fall] if profile[-1] < 0.5 * self.peak else None
        mine = (stream.top_channels[boundary] == channel) & (stream.top_values[boundary] >= 0.5 * self.peak)
        self.carriers = mine.any(dim=-1)


def massive_channels(stream: ResidualStream, settings: Detection) -> list[MassiveChannel]:
    """The massive channels, largest peak first (Sun et al. 2402.17762; scale-free as in research on small models:
    ratio to the median, normalised per boundary before the maximum over boundaries is taken). A channel that most
    tokens carry is an outlier channel, not a massive activation, and is left out. Birth and end are the sub-blocks
    with the largest rise and fall of the channel's maximum (2603.05498)."""
    ratios = torch.stack([stream.ratio(i) for i in range(len(stream.names))]).amax(0)
    found = [MassiveChannel(int(c), stream) for c in torch.nonzero(ratios >= settings.massive_ratio).flatten()]
    few = [c for c in found if c.carriers.any() and c.carriers.float().mean() <= settings.massive_token_share]
    return sorted(few, key=lambda c: -c.peak)


def find_middle(step: Step) -> nn.Module | None:
    """The child of a block whose input is the residual stream between its two sub-blocks, or None.

    Found by what it computes rather than by name: an input r != h such that r = h + (output of an earlier child).
    Parallel blocks (GPT-NeoX) and blocks that scale their sub-blocks' outputs have none.
    """
    seen: list[tuple[nn.Module, torch.Tensor | None, torch.Tensor | None]] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else kwargs.get("hidden_states")
        result = output[0] if isinstance(output, tuple) else output
        seen.append((module, given if isinstance(given, torch.Tensor) else None,
                     result if isinstance(result, torch.Tensor) else None))

    handles = [child.register_forward_hook(hook, with_kwargs=True) for child in step.block.children()]
    probe = step.walk.hidden[:1].to(step.walk.device)
    observers, step.walk.observers[:] = list(step.walk.observers), []
    try:
        step.block(probe, **step.walk.arguments[step.index])
    finally:
        step.walk.observers[:] = observers
        for handle in handles:
            handle.remove()
    for i, (module, given, _) in enumerate(seen):
        if given is None or given.numel() != probe.numel() or torch.equal(given.reshape(probe.shape), probe):
            continue
        for _, _, output in seen[:i]:
            if output is not None and output.numel() == probe.numel() and torch.allclose(
                    given.reshape(probe.shape), probe + output.reshape(probe.shape),
                    rtol=1e-5, atol=1e-6 * float(given.abs().max())):
                return module
    return None


@contextlib.contextmanager
def recorded_input(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """The first arguments of every call of a module; an empty list for None."""
    states: list[torch.Tensor] = []
    if module is None:
        yield states
        return

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield states
    finally:
        handle.remove()
