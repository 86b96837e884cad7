"""No-op heads, each confirmed by taking it out: on every text at hand, alone and together with the others.

A head that rests on a sink whose value is nearly zero writes nearly nothing (Barbero et al. 2504.02732; 2504.03889),
but may wake on another kind of text (Guo et al. 2410.13835): what is a no-op on one text only does not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinkquant.artifacts import Head
from sinkquant.artifacts.heads import HeadAblation, HeadAblations, SparedHead
from sinkquant.detect.detector import Detector, Found
from sinkquant.detect.heads import describe_heads
from sinkquant.detect.table import attention_of
from sinkquant.models import Decoder, Walk, head_columns, weight_matrix
from sinkquant.models.steps import Progress
from sinkquant.recipe import Detection, Recipe

ROWS = 16
"""Rows of every text that the ablations run on."""
PER_WALK = 8
"""Ablations that share a walk: each keeps hidden states of its own."""

MADE = 0.5
"""A head makes a massive activation if less than this share of it is left without the head."""

Place = tuple[int, int]
"""Layer and head."""


class NoOpHeads(Detector):
    """What the loss changes by without the heads that do nothing; only where a recipe takes heads out."""

    fields = ("head_ablations",)
    null = "a head that does nothing on one text only is left out"

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(decoder, recipe, name)
        if recipe.prune.heads != "none":
            for layer in decoder.attending:
                head_columns(decoder, layer)  # refuses a layer whose heads cannot be told apart

    def result(self, found: Found) -> dict[str, Any]:
        """On the rows of detection and as many of the evaluation text; None where no recipe asks."""
        if found.evaluation is None:
            return {"head_ablations": None}
        massive = max((channel for channels in found.massive for channel in channels), key=lambda one: one.peak,
                      default=None)
        ablator = HeadAblator(self.decoder, self.settings, found.device, found.dtype, found.progress,
                              None if massive is None else massive.channel, self.recipe.prune.massive)
        texts = {"calibration": found.surveys[0].rows, "evaluation": found.evaluation}
        return {"head_ablations": ablator.run(found.fields["heads"], texts, found.sinks.mask)}


@dataclass(frozen=True)
class HeadAblator:
    """Takes heads out of a decoder and looks at the loss, and at the largest massive activation.

    Attributes:
        channel: of the residual stream, with the largest massive activation; None where there is none.
        massive: whether heads may go without which little of that is left.
    """

    decoder: Decoder
    settings: Detection
    device: str
    dtype: torch.dtype
    progress: Progress | None = None
    channel: int | None = None
    massive: bool = False

    def run(self, known: list[list[Head]], texts: Mapping[str, torch.Tensor],
            sinks: Callable[[torch.Tensor], torch.Tensor]) -> HeadAblations:
        """The heads that are no-ops in `known` and on every text, and what each changes.

        Args:
            known: the heads as detection has described them, [layer][head].
            texts: name -> rows, int64 [rows, length], all of one length.
            sinks: rows -> bool [rows, length], the positions that hold a sink token.

        Raises:
            RequestError: the architecture has no output projection in which heads can be told apart.
        """
        columns = {layer: head_columns(self.decoder, layer) for layer in self.decoder.attending}
        asleep = no_ops(known)
        for rows in texts.values():
            if asleep:
                asleep &= no_ops(self._describe(rows, sinks(rows)))
        count = min(ROWS, *map(len, texts.values()))
        rows = torch.cat([rows[:count] for rows in texts.values()])
        trials = dict(zip(sorted(asleep), self.trials(rows, [[place] for place in sorted(asleep)]), strict=True))
        left = {place: kept for place, (_, kept) in trials.items()}
        making = {place: kept for place, kept in left.items()
                  if kept is not None and kept < MADE and not self.massive}
        alone = {place: change for place, (change, _) in trials.items() if place not in making}
        order = sorted(alone, key=lambda place: (alone[place], place))
        together = self.trials(rows, [order[:count + 1] for count in range(len(order))])
        heads = []
        for place, (change, _) in zip(order, together, strict=True):
            module, parts = columns[place[0]]
            part = parts[place[1]]
            heads.append(HeadAblation(layer=place[0], head=place[1], module=module, start=part.start, stop=part.stop,
                                      loss_change=alone[place], together=change, massive_left=left[place]))
        return HeadAblations(texts=list(texts), rows=count, heads=heads, weights=self._weights(), spared=[
            SparedHead(layer=layer, head=head, massive_left=kept) for (layer, head), kept in sorted(making.items())])

    def trials(self, rows: torch.Tensor, sets: list[list[Place]]) -> list[tuple[float, float | None]]:
        """For every set of heads that is taken out at once: the mean |change| of the next token's loss, nats per token,
        and how much of the largest massive activation is left; None where there is none."""
        found: list[tuple[float, float | None]] = []
        for start in range(0, len(sets), PER_WALK):
            trials = sets[start:start + PER_WALK]
            walk = Walk(self.decoder, rows, self.settings.batch_size, self.device, self.dtype)
            hidden: dict[int, torch.Tensor] = {}
            peaks, whole = [0.0] * len(trials), 0.0
            for step in walk.steps():
                for index, trial in enumerate(trials):
                    mine = [head for layer, head in trial if layer == step.index]
                    if mine or index in hidden:
                        with self._without(step.index, mine):
                            hidden[index] = step.replay(hidden.get(index, walk.hidden))
                        peaks[index] = max(peaks[index], self._peak(hidden[index]))
                whole = max(whole, here := self._peak(step.run()))
                peaks = [peak if index in hidden else max(peak, here) for index, peak in enumerate(peaks)]
                if self.progress:
                    self.progress(step.index + 1, len(self.decoder.blocks), "taking heads out")
            base = walk.losses().double()
            found += [(float((walk.losses(hidden[index]).double() - base).abs().mean()),
                       peak / whole if whole > 0 else None) for index, peak in enumerate(peaks)]
        return found

    def _peak(self, states: torch.Tensor) -> float:
        """The largest value of the massive channel in [rows, length, hidden_size]; 0 where there is none."""
        return 0.0 if self.channel is None else float(states[..., self.channel].abs().max())

    def _describe(self, rows: torch.Tensor, sinks: torch.Tensor) -> list[list[Head]]:
        walk = Walk(self.decoder, rows, self.settings.batch_size, self.device, self.dtype)
        return describe_heads(attention_of(walk), sinks, self.settings)

    @contextlib.contextmanager
    def _without(self, layer: int, heads: list[int]) -> Iterator[None]:
        """The output projection of a layer does not read some heads while the context is open."""
        name, parts = head_columns(self.decoder, layer)
        weight = weight_matrix(self.decoder.linears[name])
        before = {head: weight[:, parts[head]].clone() for head in heads}
        for head in heads:
            weight[:, parts[head]] = 0
        try:
            yield
        finally:
            for head, values in before.items():
                weight[:, parts[head]] = values

    def _weights(self) -> list[list[float]]:
        """Norm of every head's columns of the output projection, [layer][head]."""
        norms: list[list[float]] = []
        for layer, block in enumerate(self.decoder.blocks):
            if layer in self.decoder.quiet:
                norms.append([])
                continue
            name, parts = head_columns(self.decoder, layer)
            with self.decoder.present([block]):
                weight = weight_matrix(self.decoder.linears[name])
                norms.append([float(weight[:, part].float().norm()) for part in parts])
        return norms


def no_ops(heads: list[list[Head]]) -> set[Place]:
    """The heads that are marked as no-ops."""
    return {(layer, head) for layer, row in enumerate(heads) for head, one in enumerate(row) if one.no_op}
