"""What a detector is: one file, one class, some fields of the sink map, and a null.

A detector may watch the rows while they go through each block. When the walk is over it is asked for its fields, in the
order of `detectors.detectors_of`; it may read what detectors before it have found.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import TokenizationFacts
from sinkquant.detect.massive import MassiveChannel, massive_channels
from sinkquant.detect.residual import ResidualStream
from sinkquant.detect.table import AttentionTable
from sinkquant.models import Decoder, Step
from sinkquant.models.steps import Progress
from sinkquant.recipe import Recipe
from sinkquant.sinks import SinkSelector


@dataclass
class Found:
    """What is known when the walk is over.

    Attributes:
        surveys: of the rows that sinks are looked for in, the short ones first; the last one's inputs were recorded.
        repeated: of rows that repeat one token, the published negative control.
        without_bos: of the first survey's text without `<bos>`; None where its rows do not start with it.
        evaluation: as many rows of the evaluation text, where a recipe takes heads out.
        fields: what detectors have found so far, by field of the sink map.
        sinks: selects the sinks, once they are found.
        notes: sentences for the sink map.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    device: str
    dtype: torch.dtype
    facts: TokenizationFacts
    surveys: list[Survey]
    repeated: Survey
    without_bos: Survey | None
    progress: Progress | None = None
    evaluation: torch.Tensor | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    sinks: SinkSelector = field(default_factory=SinkSelector)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def massive(self) -> list[list[MassiveChannel]]:
        """Of every survey, its channels with massive activations."""
        return [massive_channels(survey.stream, survey.rows, self.recipe.detect) for survey in self.surveys]

    @property
    def best(self) -> Survey:
        """The first of the surveys that show as many of the sinks as any."""
        shown = [sum(bool(sink.mask(survey.rows).any()) for sink in self.sinks.each()) for survey in self.surveys]
        return self.surveys[shown.index(max(shown))]

    def carriers(self, index: int) -> torch.Tensor:
        """bool [rows, length], the tokens of a survey that carry a massive activation."""
        marked = torch.zeros_like(self.surveys[index].rows, dtype=torch.bool)
        for channel in self.massive[index]:
            marked |= channel.carriers
        return marked


class Detector(ABC):
    """One thing that detection looks for; made anew for every detection.

    Attributes:
        fields: what it fills of the sink map; of a detector from another package, of what the sink map holds under its
            name in `extensions`.
        null: what the same measure gives where there is nothing to find, in words.
        name: of the entry point that brought it; None where it is built in.
    """

    fields: ClassVar[tuple[str, ...]]
    null: ClassVar[str]

    def __init__(self, decoder: Decoder, recipe: Recipe, name: str | None = None) -> None:
        self.decoder, self.recipe, self.settings, self.name = decoder, recipe, recipe.detect, name

    def watch(self, survey: Survey, step: Step) -> AbstractContextManager[None]:
        """Open while one set of rows, which is no control, goes through a block."""
        return contextlib.nullcontext()

    @abstractmethod
    def result(self, found: Found) -> dict[str, Any]:
        """Field -> what was found: for every one of `fields`; values that JSON holds, from another package."""


def text_of(token_id: int | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token in letters; as the tokenizer writes it where it decodes to none by itself, or is a byte of one."""
    if token_id is None:
        return None
    text = str(tokenizer.decode([token_id]))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token_id))


@dataclass(frozen=True, eq=False)
class Survey:
    """What one set of rows showed. Of a `control` only the attention is seen.

    Attributes:
        rows: int64 [rows, length].
        recorded: whether the inputs of linears are recorded of this set.
    """

    rows: torch.Tensor
    control: bool = False
    recorded: bool = False
    table: AttentionTable = field(default_factory=AttentionTable)
    stream: ResidualStream = field(default_factory=ResidualStream)
