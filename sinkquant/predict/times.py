"""How long every stage of a run will take: counted work, at the pace that `pace.measure` finds on this machine.

What depends on what detection finds is counted as a trained model usually has it: `CANDIDATES` modules whose large
weights are zeroed to see whether they are super weights.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import LinearShape
from sinkquant.detect.detect import REPEATED_ROWS
from sinkquant.detect.super_weights import ABLATION_ROWS, NULL_WEIGHTS, PER_MODULE, SCREENED_ROWS
from sinkquant.diagnose.fidelity import LENGTH, ROWS
from sinkquant.evaluate.tasks import ready_tasks
from sinkquant.models import Decoder, encode, read_text
from sinkquant.predict.pace import Pace
from sinkquant.quantize.refine.refine import ROWS as DISTILL_ROWS
from sinkquant.recipe import Recipe

CANDIDATES = 3
BLOCKS_AFTER = 2 / 3
"""The share of the blocks that follow a candidate: they stand where massive activations are born, in the first blocks,
or end, in the last."""
SAMPLE = 50_000
"""Characters of text that are encoded to see how many make a token."""
FIDELITY_PASSES = 8.0
"""Plain forward passes of its rows that `sink_fidelity` takes for each of two models: it watches, and swaps tokens."""
VALUE_PASSES = 2.0
"""Passes over all logits, as costly as a log-softmax, that lm-eval and the divergence make."""
OPENING_EVALUATION, PER_TASK = 8.0, 0.4
"""Processor seconds of a two-core machine: importing lm-eval; a task's data for one model."""
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
        found["evaluate"] = job.evaluate(1 + len(plans), tokenizer)
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

    def evaluate(self, models: int, tokenizer: PreTrainedTokenizerBase) -> float:
        settings, pace = self.recipe.evaluate, self.pace
        token = self.blocks * pace.plain + self.head
        tasks = task_tokens(self.recipe, tokenizer, self.decoder)
        rows = settings.divergence_rows * settings.divergence_length
        fidelity = FIDELITY_PASSES * ROWS * LENGTH if settings.fidelity else 0.0
        seconds = models * (sum(tasks) * token + PER_TASK * len(settings.tasks))
        seconds += (models - 1) * 2 * (rows * token + fidelity * pace.plain * self.blocks)
        return seconds + OPENING_EVALUATION


def task_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, decoder: Decoder) -> list[float]:
    """Tokens that a model reads for each of sinkquant's own tasks; tasks of lm-eval's are not counted."""
    settings = recipe.evaluate
    content = read_text(settings.text, "evaluation", tokenizer)
    sample = content[:SAMPLE]
    per_character = len(encode(tokenizer, sample)) / max(1, len(sample))
    found = []
    with ready_tasks(settings.text, content, settings.tasks, recipe.seed) as folder:
        for path in sorted(folder.glob("*.jsonl")):
            if path.stem in settings.tasks:
                items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                lengths = [_characters(path.stem, item) for item in items[:settings.limit]]
                found.append(per_character * sum(lengths))
    return found


def _characters(task: str, item: dict[str, object]) -> int:
    """Characters that a model is given for one item, over all of its answers."""
    if task == "sink_perplexity":
        return len(str(item["text"]))
    if task == "sink_cloze":
        answers = item["choices"]
        assert isinstance(answers, list)
        return sum(len(str(item["context"])) + len(answer) for answer in answers)
    openings = item["openings"]
    assert isinstance(openings, list)
    return sum(len(opening) + len(str(item["middle"])) + len(str(item["end"])) for opening in openings)
