"""One walk of several sets of rows with everything watching that detection needs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.detect.detector import Detector, Progress, Survey
from sinkquant.detect.middle import Middle, find_middle
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Step, Walk, answer, pick_device, together, token_rows, weight_matrix
from sinkquant.recipe import Recipe

FORWARD_VALUES = 1 << 22
"""What a linear gives for one batch, in values: 16 MB in float32."""


class Surveyor:
    """Walks sets of rows through the decoder while detectors watch."""

    def __init__(self, decoder: Decoder, recipe: Recipe, progress: Progress | None,
                 detectors: Sequence[Detector] = ()) -> None:
        self.decoder, self.recipe, self.progress, self.detectors = decoder, recipe, progress, detectors
        self.device = pick_device(recipe.compute.device)
        self.dtype = getattr(torch, recipe.compute.dtype)

    def rows(self, tokenizer: PreTrainedTokenizerBase, content: str, count: int, length: int) -> torch.Tensor:
        if length > self.decoder.max_length:
            raise RequestError(f"detect.length is {length}, but the model has positions for {self.decoder.max_length} "
                               "tokens only; set it lower.")
        return token_rows(tokenizer, content, count, length, self.recipe.calibration.bos, self.decoder.vocabulary,
                          key="detect.length")

    @property
    def long_length(self) -> int:
        """Tokens of the longer rows, as long as the model allows."""
        return min(self.recipe.detect.long_length, self.decoder.max_length)

    def long_rows(self, tokenizer: PreTrainedTokenizerBase, content: str) -> torch.Tensor | None:
        """Rows for sinks further back, as long as the model and the text allow; None where they allow no more than
        the short ones have."""
        settings = self.recipe.detect
        if settings.long_rows == 0 or self.long_length <= settings.length:
            return None
        try:
            return self.rows(tokenizer, content, settings.long_rows, self.long_length)
        except RequestError:
            return None

    def run(self, sets: Sequence[torch.Tensor | None],
            controls: Sequence[torch.Tensor | None]) -> list[Survey | None]:
        """Survey several sets of rows in one reading of the weights, and controls beside them. The inputs of linears
        are recorded of the last set that is there."""
        last = max(index for index, rows in enumerate(sets) if rows is not None)
        surveys = [None if rows is None else Survey(rows, control=index >= len(sets), recorded=index == last)
                   for index, rows in enumerate([*sets, *controls])]
        there = [survey for survey in surveys if survey is not None]
        walks = [self._walk(survey) for survey in there]
        for steps in together(walks):
            answer(steps)
            middle: Middle | None = None
            for survey, step in zip(there, steps, strict=True):
                middle = self._look(survey, step, middle)
            if self.progress:
                self.progress(steps[0].index + 1, len(self.decoder.blocks), "reading attention")
        return surveys

    def pace(self, rows: torch.Tensor, recorded: bool) -> float:
        """Seconds that the first block takes for these rows, everything watching, and where `recorded` the inputs of
        its linears as well; its weights are read before."""
        survey = Survey(rows, recorded=recorded)
        with contextlib.closing(together([self._walk(survey)])) as walking:
            (step,) = next(walking)
            start = time.perf_counter()
            self._look(survey, step, None)
            return time.perf_counter() - start

    def _walk(self, survey: Survey) -> Walk:
        return Walk(self.decoder, survey.rows, batch_rows(self.decoder, self.recipe, survey.rows.shape[1]),
                    self.device, self.dtype, [survey.table])

    def _look(self, survey: Survey, step: Step, middle: Middle | None) -> Middle | None:
        """Let one set of rows go through a block. middle, and what comes back: where the block shows the residual
        stream between its sub-blocks, as far as that was found."""
        if survey.control:
            step.run()
        else:
            # Looking for it runs the block on a row of its own, which no detector must see.
            middle = middle or find_middle(step)
            with contextlib.ExitStack() as watching:
                for detector in self.detectors:
                    watching.enter_context(detector.watch(survey, step))
                survey.stream.run(step, middle, search=False)
        step.advance()
        if step.index not in self.decoder.quiet:
            survey.table.require_causal(len(survey.rows), type(self.decoder.model).__name__)
        survey.table.close_layer(survey.rows)
        return middle


def batch_rows(decoder: Decoder, recipe: Recipe, length: int) -> int:
    """Rows of a length that run through a block together: `detect.batch_size` of 64 tokens, and on a CPU no more than
    keep what the widest linear gives within `FORWARD_VALUES`. More would take memory and no time off."""
    tokens = recipe.detect.batch_size * 64
    if pick_device(recipe.compute.device) == "cpu":
        widest = max(max(weight_matrix(linear).shape) for linear in decoder.linears.values())
        tokens = min(tokens, FORWARD_VALUES // widest)
    return max(1, tokens // length)
