"""Which of the tokens that draw attention are sinks of the model, and by which criteria.

A sink draws attention: enough heads look at it. That a token is massive never makes it one; it only lets a single head
do, and lets tokens that share a sink's mass be seen together. Beside a stronger sink, a token that draws less than half
as many heads, and is not massive wherever it stands, is a secondary sink (2512.22213): a weak word, say, that stands in
for the sink in a shorter run of layers, or in some places. It is reported by itself, and nothing is kept exact for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import SinkCriterion, SinkKind, SinkToken
from sinkquant.detect.detector import Detector, Found, Survey, text_of
from sinkquant.detect.table import AttentionTable
from sinkquant.detect.tokens import SinkCandidate, find_sinks
from sinkquant.models.text import is_delimiter
from sinkquant.recipe import Detection
from sinkquant.sinks import SinkSelector

SHARERS = 3
"""Looks beside the known sinks: each may find one more that shares their heads."""
COVERED = 0.5
"""A candidate of whose occurrences so many are sinks already is no other one."""


@dataclass(frozen=True)
class Sink:
    """A sink before it has a name. always_massive: most of its occurrences carry a massive activation."""

    candidate: SinkCandidate
    criteria: tuple[SinkCriterion, ...]
    always_massive: bool

    @property
    def massive(self) -> bool:
        """Whether it carries a massive activation."""
        return "massive" in self.criteria


class Sinks(Detector):
    """The sink tokens, positions and learned columns."""

    fields = ("tokens", "secondary")
    null = "over five random models of each of thirteen families the largest score of any token in any head is 0.16"

    def result(self, found: Found) -> dict[str, Any]:
        """With their kinds and names. Leaves the selector of sinks in `found`."""
        carriers = [found.carriers(index) for index in range(len(found.surveys))]
        sinks, secondary = decide(found.surveys, carriers, found.without_bos, self.settings)
        found.sinks = SinkSelector.of(sink.candidate for sink in sinks)
        tokens = [_named(sink, found.tokenizer) for sink in sinks]
        learned = _learned(found.surveys[0].table, self.settings.threshold)
        return {"tokens": tokens + ([learned] if learned is not None else []),
                "secondary": [_named(sink, found.tokenizer) for sink in secondary]}


def decide(surveys: Sequence[Survey], carriers: Sequence[torch.Tensor], without_bos: Survey | None,
           settings: Detection) -> tuple[list[Sink], list[Sink]]:
    """The sinks of all surveys, each once, with the figures of the first that shows it; and the secondary ones.

    Args:
        carriers: of every survey bool [rows, length], the tokens with massive activations.
        without_bos: the first survey's text without `<bos>`, where its rows start with it. A first position that draws
            half as many heads there needs no `<bos>`. Where rows start with none, no first position needs its token:
            that all rows begin alike is the text's.
    """
    found: list[Sink] = []
    strongest = 0.0
    for survey, massive in zip(surveys, carriers, strict=True):
        for look in _looks(survey, massive, found, settings):
            for sink in look if without_bos is not None else map(_of_any_token, look):
                if not _covered(sink.candidate, survey.rows, found):
                    found.append(sink)
                    strongest = max(strongest, sink.candidate.sink_heads)
    primary = [sink for sink in found if sink.always_massive or (
        "shared_mass" not in sink.criteria and sink.candidate.sink_heads >= strongest / 2)]
    secondary = [sink for sink in found if sink not in primary]
    if without_bos is None:
        return primary, secondary
    bare = {c.position: c for c in find_sinks(without_bos.table, without_bos.rows, settings)}
    return [_unbound(sink, bare.get(0)) for sink in primary], secondary


def _looks(survey: Survey, carriers: torch.Tensor, found: list[Sink], settings: Detection) -> Iterator[list[Sink]]:
    """Sinks of one survey, look by look; each look knows what the caller made of those before it."""
    table, rows = survey.table, survey.rows
    heads = sum(layer.received.shape[1] for layer in table.layers)

    def judged(look: list[SinkCandidate], criterion: SinkCriterion, least: float = 0.0) -> list[Sink]:
        sinks = []
        for candidate in look:
            massive = _carries(candidate, rows, carriers)
            often = candidate.rows >= min(settings.min_occurrences, len(rows)) and candidate.sink_heads * heads > 1.5
            if candidate.sink_heads >= max(settings.min_head_share, least) and (massive or often):
                sinks.append(Sink(candidate, (criterion, "massive") if massive else (criterion,),
                                  _share(candidate, rows, carriers) >= 0.5))
        return sinks

    yield judged(find_sinks(table, rows, settings), "attention")
    if carriers.any():
        together = find_sinks(table, rows, settings, carriers=carriers)
        # The null of sharing: what the tokens that are not massive receive in the same heads.
        plain = max((c.sink_heads for c in together if not _carries(c, rows, carriers)
                     and c.rows >= min(settings.min_occurrences, len(rows))), default=0.0)
        yield [sink for sink in judged(together, "shared_mass", plain) if sink.massive]
    for _ in range(SHARERS):
        if found:
            known = SinkSelector.of(sink.candidate for sink in found).mask(rows)
            yield judged(find_sinks(table, rows, settings, known=known), "remaining_mass",
                         max(sink.candidate.sink_heads for sink in found) / 2)


def _covered(candidate: SinkCandidate, rows: torch.Tensor, found: list[Sink]) -> bool:
    here = SinkSelector.of([candidate]).mask(rows)
    return bool(SinkSelector.of(sink.candidate for sink in found).mask(rows)[here].float().mean() >= COVERED)


def _carries(candidate: SinkCandidate, rows: torch.Tensor, carriers: torch.Tensor) -> bool:
    """Whether most occurrences carry a massive activation, or most first ones of a row: in large models only the first
    full stop is massive, the later ones are plain tokens."""
    here = SinkSelector.of([candidate]).mask(rows)
    first = here & (here.cumsum(dim=1) == 1)
    return max(_share(candidate, rows, carriers), float(carriers[first].float().mean())) >= 0.5


def _share(candidate: SinkCandidate, rows: torch.Tensor, carriers: torch.Tensor) -> float:
    """The share of a candidate's occurrences that carry a massive activation."""
    return float(carriers[SinkSelector.of([candidate]).mask(rows)].float().mean())


def _of_any_token(sink: Sink) -> Sink:
    """The sink without its token id, where it is the first position."""
    if sink.candidate.position != 0:
        return sink
    return replace(sink, candidate=replace(sink.candidate, token_id=None))


def _unbound(sink: Sink, bare: SinkCandidate | None) -> Sink:
    """The sink without its token id, where its position draws at least half as many heads without `<bos>`."""
    candidate = sink.candidate
    if candidate.position != 0 or bare is None or bare.sink_heads < candidate.sink_heads / 2:
        return sink
    return _of_any_token(sink)


def _named(sink: Sink, tokenizer: PreTrainedTokenizerBase) -> SinkToken:
    """Give a sink its kind."""
    candidate = sink.candidate
    text = text_of(candidate.token_id, tokenizer)
    kind: SinkKind = "token"
    if candidate.token_id is not None and candidate.token_id == tokenizer.bos_token_id:
        kind = "bos"
    elif candidate.position == 0:
        kind = "first_position"
    elif text is not None and is_delimiter(text):
        kind = "delimiter"
    return SinkToken(token_id=candidate.token_id, text=text, position=candidate.position, kind=kind,
                     attention=candidate.attention, heads=candidate.heads, share=candidate.share, massive=sink.massive,
                     criteria=list(sink.criteria), layers=list(candidate.layers))


def _learned(table: AttentionTable, threshold: float) -> SinkToken | None:
    """The virtual column of a learned sink (gpt-oss), where it draws attention in at least one head."""
    if not table.has_learned_sink:
        return None
    layers = [index for index in table.attending if (table.layers[index].learned.mean(0) > threshold).any()]
    if not layers:
        return None
    mass = torch.cat([layer.learned for layer in table.layers], dim=1)
    return SinkToken(token_id=None, text=None, position=None, kind="learned", attention=float(mass.mean()),
                     heads=float((mass > threshold).float().mean()), share=0.0, massive=False, criteria=["learned"],
                     layers=layers)
