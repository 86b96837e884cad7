"""Massive activations: where in the residual stream they are born, how large they get, who carries them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.models import Step
from sinkquant.recipe import Detection

TOP = 4
"""Channels remembered per token: more than one, since a token may carry several massive channels."""
PIECE = 1 << 20
"""Values that are looked at at a time."""


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
        self.top_values.append(torch.cat(boundary.top_values))
        self.top_channels.append(torch.cat(boundary.top_channels))

    def ratio(self, boundary: int) -> torch.Tensor:
        """[hidden_size], largest |h| of every channel over the boundary's median |h|."""
        return self.maximum[boundary] / max(self.median[boundary], 1e-30)

    def run(self, step: Step) -> None:
        """Run a step of the walk and record the boundaries in and after its block."""
        if step.index == 0:
            self.add("embedding", [step.walk.hidden])
        middle, between = find_middle(step), _Boundary()
        with _watched(middle, between, step.walk.hidden.shape[1:]):
            outputs = step.run()
        if middle is not None:
            self._close(f"layers.{step.index}.attention", between)
        self.add(f"layers.{step.index}.mlp" if middle is not None else f"layers.{step.index}", [outputs])


class _Boundary:
    """What is kept of the batches of one boundary; the hidden states themselves are not."""

    def __init__(self) -> None:
        self.maximum: list[torch.Tensor] = []
        self.median: list[float] = []
        self.top_values: list[torch.Tensor] = []
        self.top_channels: list[torch.Tensor] = []

    def add(self, states: torch.Tensor) -> None:
        """states: [rows, length, hidden_size]."""
        for part in states.split(max(1, PIECE // states[0].numel())):
            magnitudes = part.abs().float()
            self.maximum.append(magnitudes.amax(dim=(0, 1)).cpu())
            top = magnitudes.topk(min(TOP, part.shape[-1]), dim=-1)
            self.top_values.append(top.values.cpu())
            self.top_channels.append(top.indices.cpu())
        self.median.append(median_magnitude(states))


def median_magnitude(states: torch.Tensor) -> float:
    """`states.abs().float().median()`, of at least one finite value, without a copy of `states`.

    The bits of a float that is not negative are ordered as the float is: their upper half is counted over all values,
    then the lower half of those whose upper half is the median's.
    """
    rank, bits = (states.numel() - 1) // 2, 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.long, device=states.device)
        for part in states.reshape(-1).split(PIECE):
            ordered = part.abs().float().view(torch.int32)
            if shift == 0:
                ordered = ordered[ordered >> 16 == bits >> 16]
            counts += torch.bincount(ordered >> shift & 0xFFFF, minlength=1 << 16)
        below = counts.cumsum(0)
        half = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[half] - counts[half])
        bits |= half << shift
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


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


def massive_channels(stream: ResidualStream, rows: torch.Tensor, settings: Detection) -> list[MassiveChannel]:
    """The massive channels, largest peak first (Sun et al. 2402.17762; scale-free as in research on small models:
    ratio to the median, normalised per boundary before the maximum over boundaries is taken). A channel that many
    positions AND many token ids carry is an outlier channel, not a massive activation, and is left out. Birth and end
    are the sub-blocks with the largest rise and fall of the channel's maximum (2603.05498). The null: over five
    random models of each of thirteen families the largest ratio is 10.1, where the threshold is 50.

    Args:
        rows: int64 [rows, length], the rows that `stream` watched.
    """
    ratios = torch.stack([stream.ratio(i) for i in range(len(stream.names))]).amax(0)
    found = [MassiveChannel(int(c), stream) for c in torch.nonzero(ratios >= settings.massive_ratio).flatten()]
    few = [c for c in found if c.carriers.any() and min(
        float(c.carriers.float().mean()), _share_of_ids(c.carriers, rows)) <= settings.massive_token_share]
    return sorted(few, key=lambda c: -c.peak)


def _share_of_ids(marked: torch.Tensor, rows: torch.Tensor) -> float:
    """The share of token ids most of whose occurrences are marked."""
    ids, inverse = rows.unique(return_inverse=True)
    inside = torch.bincount(inverse.flatten(), weights=marked.flatten().double(), minlength=len(ids))
    return float((inside >= 0.5 * torch.bincount(inverse.flatten(), minlength=len(ids))).double().mean())


@dataclass(frozen=True)
class Middle:
    """Where a block shows the residual stream between its two sub-blocks: as the input of `module`, or, in a block
    whose sub-blocks run in parallel, as the block's input plus the output of its attention `module`."""

    module: nn.Module
    parallel_to: nn.Module | None = None


def find_middle(step: Step) -> Middle | None:
    """Where the residual stream between a block's two sub-blocks can be seen, or None.

    Found by what the children of the block compute rather than by name: an input r != h such that r = h + c * (output
    of an earlier child) for a scalar c (1, or Granite's residual multiplier); or, in parallel blocks, two outputs with
    block output = h + a + b, of which the attention's counts as written first.
    """
    seen: list[tuple[nn.Module, torch.Tensor | None, torch.Tensor | None]] = []
    probe = step.walk.hidden[:1].to(step.walk.device)

    def as_probe(given: Any) -> torch.Tensor | None:
        # Some blocks flatten rows and positions between their sub-blocks (OPT).
        fits = isinstance(given, torch.Tensor) and given.numel() == probe.numel()
        return given.reshape(probe.shape) if fits else None

    def hook(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else kwargs.get("hidden_states")
        seen.append((module, as_probe(given), as_probe(output[0] if isinstance(output, tuple) else output)))

    handles = [child.register_forward_hook(hook, with_kwargs=True) for child in step.block.children()]
    observers, step.walk.observers[:] = list(step.walk.observers), []
    try:
        result = step.probe(probe)
    finally:
        step.walk.observers[:] = observers
        for handle in handles:
            handle.remove()
    for i, (module, given, _) in enumerate(seen):
        if given is None or torch.equal(given, probe):
            continue
        change = given - probe
        for _, _, output in seen[:i]:
            if output is not None and _is_multiple(change, output, probe):
                return Middle(module)
    total = (result[0] if isinstance(result, tuple) else result) - probe
    written = [(module, output) for module, _, output in seen if output is not None]
    for module, first in written:
        if "attention" in type(module).__name__.lower():
            for other, second in written:
                if other is not module and _close(total, first + second, probe):
                    return Middle(module, parallel_to=step.block)
    return None


def _is_multiple(change: torch.Tensor, output: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether change = c * output for one scalar c."""
    energy = float(output.double().square().sum())
    if energy == 0:
        return False
    return _close(change, float((change.double() * output.double()).sum()) / energy * output, probe)


def _close(a: torch.Tensor, b: torch.Tensor, probe: torch.Tensor) -> bool:
    """Equal up to the rounding of sums with `probe`."""
    precision = max(1e-6, 2 * torch.finfo(probe.dtype).eps)
    return torch.allclose(a, b, rtol=10 * precision, atol=precision * float(probe.abs().max() + a.abs().max()))


@contextlib.contextmanager
def _watched(middle: Middle | None, boundary: _Boundary, shape: torch.Size) -> Iterator[None]:
    """Add the residual stream at `middle` to `boundary` for every batch that runs in the context; nothing for None.

    Args:
        shape: [length, hidden_size]; some blocks flatten rows and positions between their sub-blocks (OPT).
    """
    if middle is None:
        yield
        return
    parallel, entered = middle.parallel_to, []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if parallel is None:
            boundary.add(state.reshape(-1, *shape))
        else:
            entered.append(state)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        state = entered.pop() + (output[0] if isinstance(output, tuple) else output)
        boundary.add(state.reshape(-1, *shape))

    handles = [(parallel or middle.module).register_forward_pre_hook(before, with_kwargs=True)]
    if parallel is not None:
        handles.append(middle.module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
