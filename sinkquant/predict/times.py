"""How long every stage of a run will take: counted work, at the pace that `pace.measure` finds on this machine.

What depends on what detection finds is counted as a trained model usually has it: `CANDIDATES` modules whose large
weights are zeroed to see whether they are super weights.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import LinearShape
from sinkquant.detect.detect import REPEATED_ROWS
from sinkquant.detect.super_weights import ABLATION_ROWS, NULL_WEIGHTS, PER_MODULE, SCREENED_ROWS
from sinkquant.evaluate.costs import evaluation_work
from sinkquant.models import Decoder
from sinkquant.predict.pace import Pace
from sinkquant.quantize.refine.refine import ROWS as DISTILL_ROWS
from sinkquant.recipe import Recipe

CANDIDATES = 3
BLOCKS_AFTER = 2 / 3
"""The share of the blocks that follow a candidate: they stand where massive activations are born, in the first blocks,
or end, in the last."""
VALUE_PASSES = 2.0
"""Passes over all logits, as costly as a log-softmax, that lm-eval and the divergence make."""
READ_BYTES = 1e9
"""Bytes per second that files are read and written at."""


def stages(decoder: Decoder, recipe: Recipe, pace: Pace, tokenizer: PreTrainedTokenizerBase,
           linears: list[list[LinearShape]], calibrated: bool, asymmetric: bool) -> dict[str, float]:
    """Stage, as `WorkFolder.timed` calls it -> seconds.

    Args:
        linears: those of every block. calibrated: whether rows walk while quantizing; asymmetric: with GPTAQ.
    """
    job = _Job(decoder, recipe, pace, linears)
    found = {"detect": job.detect(recipe.detect.super_weights)}
    quantize = job.quantize(calibrated, asymmetric)
    plans = ["sink_aware"] + (["control"] if recipe.evaluate.control and not recipe.evaluate.skip else [])
    for name in plans:
        found[f"quantize {name}"] = quantize
        if not recipe.evaluate.skip:
            found[f"detect {name}"] = job.detect(False)
    if not recipe.evaluate.skip:
        found["evaluate"] = job.evaluate(len(plans), tokenizer)
    return found


class _Job:
    def __init__(self, decoder: Decoder, recipe: Recipe, pace: Pace, linears: list[list[LinearShape]]) -> None:
        self.decoder, self.recipe, self.pace, self.linears = decoder, recipe, pace, linears
        self.blocks = len(decoder.blocks)
        self.weights = sum(p.numel() for block in decoder.blocks for p in block.parameters())
        self.reading = self.weights * decoder.model.dtype.itemsize / READ_BYTES
        # One token through the head, and the passes over what it gives.
        self.head = decoder.vocabulary * (2 * decoder.hidden_size * pace.operation + VALUE_PASSES * pace.value)
        self.loss = decoder.vocabulary * (2 * decoder.hidden_size * pace.operation + pace.scored)

    def detect(self, super_weights: bool) -> float:
        settings, (short, long) = self.recipe.detect, self.pace.watched
        block = 2 * short.of(settings.rows * settings.length) + short.of(REPEATED_ROWS * settings.length)
        if settings.long_rows:
            block += long.of(settings.long_rows * min(settings.long_length, self.decoder.max_length))
        seconds = self.blocks * block + self.reading
        if super_weights:
            for rows, trials in ((SCREENED_ROWS, PER_MODULE + NULL_WEIGHTS), (ABLATION_ROWS, PER_MODULE)):
                tokens, tried = min(rows, settings.rows) * settings.length, CANDIDATES * trials
                replays = self.blocks * (1 + BLOCKS_AFTER * tried)
                seconds += tokens * (replays * self.pace.plain + (1 + tried) * self.loss) + self.reading
        return seconds

    def quantize(self, calibrated: bool, asymmetric: bool) -> float:
        pace = self.pace
        seconds = self.weights * pace.kept + 2 * self.reading
        if not calibrated:
            return seconds + self.weights * pace.rounded
        settings, descent = self.recipe.calibration, self.recipe.weights.descent
        tokens = settings.rows * settings.length
        seconds += tokens * self.blocks * pace.plain * (4 if asymmetric else 2)
        operations = 0.0
        for block in self.linears:
            inputs = {x.part_of or (x.fused_with[0] if x.fused_with else str(i)): x for i, x in enumerate(block)
                      if not x.fixed}
            operations += sum(2.0 * tokens * x.columns ** 2 for x in inputs.values())
            for x in block:
                if not x.fixed:
                    operations += 5.0 * x.columns ** 3 + (12.0 * descent + 7) * x.rows * x.columns ** 2
                    seconds += x.columns * (pace.column + pace.column_row * x.rows)
        if self.recipe.weights.distill:
            tuned = self.recipe.weights.distill * DISTILL_ROWS * settings.length
            head = 2.0 * self.decoder.vocabulary * self.decoder.hidden_size
            seconds += (3 * tuned + 2 * tokens) * self.blocks * pace.plain
            operations += (3 * tuned + 4 * tokens) * head
        return seconds + operations * pace.operation

    def evaluate(self, plans: int, tokenizer: PreTrainedTokenizerBase) -> float:
        work = evaluation_work(self.recipe, tokenizer, plans, self.decoder.max_length)
        return work.read * self.blocks * self.pace.plain + work.predicted * self.head + work.seconds
