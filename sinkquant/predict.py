"""What a run will take: peak memory, from shapes and the recipe alone, before any weight is read; and time, which is
counted work at the pace that this machine shows with the model's first block.

Every term is a buffer that a stage holds at its worst moment; the peak is that of the worst stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import LinearShape
from sinkquant.detect.residual import TOP
from sinkquant.detect.survey import batch_rows
from sinkquant.errors import RequestError
from sinkquant.evaluate.divergence import LOGITS_BYTES, POSITIONS
from sinkquant.models import Decoder
from sinkquant.models.alone import in_groups
from sinkquant.models.experts import fused_parameters
from sinkquant.models.memory import LARGE
from sinkquant.pace import measure
from sinkquant.quantize.distill import LOGITS_BYTES as DISTILL_LOGITS
from sinkquant.quantize.distill import ROWS as DISTILL_ROWS
from sinkquant.quantize.rounded import TOGETHER
from sinkquant.recipe import Recipe
from sinkquant.times import stages

CHEAPER = ("evaluate.batch_size=1", "evaluate.skip=true", "calibration.batch_size=1", "detect.batch_size=1",
           "sensitivity.batch_size=1", "sensitivity.measure_rows=0", "sensitivity.rows=16", "compute.dtype=bfloat16",
           "weights.method=rtn", "weights.distill=0")
"""Settings that take less memory, in the order in which they are proposed."""
SENSITIVITIES = "find sensitivities"
"""The stage that only a budget that is solved for, a file of sensitivities, and advice have."""
RELOADED = 1 << 30
SPILL_SHARE = 8
"""Hidden states that take more than this part of the memory go to a mapped file."""
EVALUATED_AT_ONCE = 1024
"""Tokens of the longest request of sinkquant's own tasks, where the model has positions for them."""
EVALUATION_LOADS = 0.25e9
"""lm-eval, datasets, pyarrow and matplotlib, which only evaluation needs."""
PIECES = 32e6
"""What is looked at of hidden states at a time, with its copies."""
KEPT_OF_SMALL = 1.2
"""What is resident over what is in use where tensors are too small for the allocator to map each by itself."""
KEPT_BY_ALLOCATOR = 1.15
"""What is resident over what is in use, measured over the blocks of a walk."""


@dataclass(frozen=True)
class Prediction:
    """What a run will take.

    Attributes:
        peak_bytes: stage -> resident bytes above what the process holds now. seconds: stage, under the name that it is
            timed by -> time; empty where nothing was timed.
    """

    peak_bytes: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The peak of the worst stage."""
        return self.worst(None)

    def worst(self, stages: Sequence[str] | None) -> float:
        """The peak of the worst of some stages; None for all."""
        return max((size for stage, size in self.peak_bytes.items() if stages is None or stage in stages), default=0.0)


def memory_allowed(recipe: Recipe) -> float:
    """Bytes that a run may take: `compute.memory_limit`, or what is free on the machine."""
    if recipe.compute.memory_limit is not None:
        return recipe.compute.memory_limit * 1e9
    return float(psutil.virtual_memory().available)


def spill_limit(recipe: Recipe) -> int:
    """Bytes of hidden states that stay in RAM."""
    return int(memory_allowed(recipe) / SPILL_SHARE)


def require_memory(decoder: Decoder, recipe: Recipe, stages: Sequence[str] | None = None,
                   sensitivities: bool | None = None) -> Prediction:
    """Predict a run, and refuse it if it will not fit.

    Args:
        stages: those that have to fit; None for all.
        sensitivities: whether they are looked for; None: where the recipe's budget is solved for.

    Raises:
        RequestError: it needs more than `memory_allowed`; with the settings that would make it fit.
    """
    allowed = memory_allowed(recipe)

    def predicted(settings: Sequence[str]) -> Prediction:
        return predict(decoder, recipe.replace(settings), sensitivities)

    found = predicted([])
    if found.worst(stages) <= allowed:
        return found
    due = {stage: size for stage, size in found.peak_bytes.items() if stages is None or stage in stages}
    stage = max(due, key=lambda name: due[name])
    changed: list[str] = []
    least = found.worst(stages)
    for setting in CHEAPER:
        if predicted([*changed, setting]).worst(stages) > least:
            continue  # what the recipe has already is less
        changed.append(setting)
        least = predicted(changed).worst(stages)
        if least <= allowed:
            needed = _needed(changed, lambda settings: predicted(settings).worst(stages) <= allowed)
            advice = f"--set {' --set '.join(needed)} makes it fit"
            break
    else:
        advice = f"no setting makes it fit; {least / 1e9:.1f} GB are the least"
    limit = "compute.memory_limit" if recipe.compute.memory_limit is not None else "the free memory"
    raise RequestError(f"the run needs {due[stage] / 1e9:.1f} GB of memory to {stage}, and {limit} is "
                       f"{allowed / 1e9:.1f} GB; {advice}.")


def predict(decoder: Decoder, recipe: Recipe, sensitivities: bool | None = None) -> Prediction:
    """Predict the memory of a run of a recipe on a model, which may be one from `open_model`; `sensitivities` as in
    `require_memory`."""
    job = _Job(decoder, recipe)
    peaks = {"detect": job.detect_bytes(), "quantize": job.quantize_bytes()}
    if recipe.budget.solved if sensitivities is None else sensitivities:
        peaks[SENSITIVITIES] = job.sensitivity_bytes()
    if recipe.weights.distill:
        peaks["distill"] = job.distill_bytes()
    if not recipe.evaluate.skip:
        peaks["evaluate"] = job.evaluate_bytes()
    return Prediction(peaks)


def with_seconds(found: Prediction, decoder: Decoder, recipe: Recipe,
                 tokenizer: PreTrainedTokenizerBase) -> Prediction:
    """A prediction with the time of every stage: a few rows go through the first block, and small matrices are
    quantized, to see what this machine takes."""
    job = _Job(decoder, recipe)
    pace = measure(decoder, recipe, job.calibrated)
    return replace(found, seconds=stages(decoder, recipe, pace, tokenizer, job.linears, job.calibrated, job.asymmetric))


def _needed(changed: list[str], fits: Callable[[list[str]], bool]) -> list[str]:
    """Those of the settings without which it would not fit."""
    needed = list(changed)
    for setting in changed:
        fewer = [other for other in needed if other != setting]
        if fits(fewer):
            needed = fewer
    return needed


class _Job:
    """Sizes of one model under one recipe."""

    def __init__(self, decoder: Decoder, recipe: Recipe) -> None:
        self.decoder, self.recipe = decoder, recipe
        dtype = getattr(torch, recipe.compute.dtype)
        self.item, self.stored = dtype.itemsize, decoder.model.dtype.itemsize
        shape = decoder.shape("")
        self.linears = [[linear for linear in shape.linears.values() if linear.block == index]
                        for index in range(len(decoder.blocks))]
        self.block = max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
        self.read = _read_at_once(decoder)
        self.total = sum(p.numel() for p in decoder.model.parameters())
        self.largest = max(linear.parameters for block in self.linears for linear in block)
        self.tensor = max(p.numel() for block in decoder.blocks for p in block.parameters())
        self.widest = max(max(linear.columns, linear.rows) for block in self.linears for linear in block)
        self.hidden, self.vocabulary = decoder.hidden_size, decoder.vocabulary
        self.heads = int(decoder.model.config.get_text_config(decoder=True).num_attention_heads)
        methods = {recipe.weights.method, *(o.method for o in recipe.weights.overrides)} - {None, "rtn"}
        static = recipe.activations.format != "16-bit" and recipe.activations.scale == "tensor"
        scaled = recipe.weights.smooth != "none" or recipe.protect.channels == "scale"
        self.calibrated = bool(methods) or static or scaled or recipe.weights.distill > 0 or (
            recipe.prune.method in ("wanda", "sparsegpt"))
        self.asymmetric = "gptaq" in methods
        self.memory = memory_allowed(recipe)

    def detect_bytes(self) -> float:
        settings = self.recipe.detect
        sets = self._detected_tokens()
        batch = max(batch_rows(self.decoder, self.recipe, length) * length
                    for length in (settings.length, min(settings.long_length, self.decoder.max_length)))
        buffers = (sum(sets) + max(sets)) * self.hidden * self.item
        watched = batch * (self.widest + 3 * self.hidden) * 4 + PIECES
        tables = sum(sets) * (4 * self.heads + 2 * 12 * TOP) * len(self.linears)
        running = self.block * self.item + watched + self._activations(batch, settings.length)
        return max(self._walked(), running) + buffers + tables

    def quantize_bytes(self) -> float:
        dense = 2 * self.total * self.stored if self.total * self.stored <= RELOADED else 0
        if not self.calibrated:
            read = self.block if self.recipe.prune.asked else self.read
            return max(read * (self.stored + 1) + self.largest * (4 + self.stored), dense)
        settings = self.recipe.calibration
        states = settings.rows * settings.length * self.hidden * self.item
        buffers = 0 if states > self.memory / SPILL_SHARE else 3 * states
        hessians, solve = 0.0, 0.0
        for block in self.linears:
            inputs = {_input(linear, i): linear for i, linear in enumerate(block) if not linear.fixed}
            sums = 8.0 * sum(linear.columns ** 2 for linear in inputs.values())
            hessians = max(hessians, sums + 4 * max((linear.columns ** 2 for linear in inputs.values()), default=0))
            solve = max([solve, *(sums + 48.0 * linear.columns ** 2 + 16 * linear.parameters
                                  for linear in inputs.values())])
        return max(self._walked() + self.block + buffers + max(
            hessians + self._activations(settings.batch_size * settings.length, settings.length), solve), dense)

    def sensitivity_bytes(self) -> float:
        settings, longest = self.recipe.sensitivity, self.decoder.max_length
        length = min(settings.length, longest)
        tokens, batch = settings.rows * length, settings.batch_size * length
        small = batch * self.hidden * self.item < LARGE
        solved = {*settings.methods} != {"rtn"} if settings.methods else self.recipe.weights.method != "rtn"
        seen, solve = 0.0, 0.0
        for block in self.linears:
            free = [(_input(linear, i), linear) for i, linear in enumerate(block) if not linear.fixed]
            wide = sum({name: linear.columns for name, linear in free}.values())
            # Every linear's gradient; of experts that of the layer, and what one of them makes of its tokens.
            wide += sum({(linear.part_of or i): self.hidden if linear.part_of else linear.rows
                         for i, (_, linear) in enumerate(free)}.values())
            wide += max((2 * (linear.rows + linear.columns) for _, linear in free if linear.part_of), default=0)
            seen = max(seen, float(tokens * wide * self.item))
            solve = max([solve, *(max(12.0 * linear.columns ** 2, (4.0 + (40 if solved else 0))
                                      * linear.columns ** 2 + 16 * linear.parameters + 12 * batch * linear.rows)
                                  for _, linear in free)])
        peaks = [self._walked_back(tokens, batch, length) + seen + max(solve, self._graph(batch, length))]
        if settings.kv_bits:
            length = min(settings.kv_length, longest)
            batch = min(settings.batch_size, settings.kv_rows) * length
            scores = 7.0 * 4 * batch * self.heads * length
            peaks.append(self._walked_back(settings.kv_rows * length, batch, length) + self._graph(batch, length)
                         + scores)
        if settings.measure_rows:
            length = min(settings.measure_length, longest)
            base, at_once = settings.measure_rows, min(settings.measure_rows, settings.batch_size)
            logits = 4.0 * self.vocabulary * length * (base + 3 * at_once + 8)
            peaks.append(self.total * self.item + self.tensor * self.stored + 3.0 * tokens * self.hidden * self.item
                         + logits + solve)
        return (KEPT_OF_SMALL if small else 1.0) * (max(peaks) + PIECES)

    def _walked_back(self, tokens: int, batch: int, length: int) -> float:
        """A walk back: a block, and what comes into every block and its gradient; or the head with a batch's logits."""
        states = tokens * self.hidden * self.item
        kept = 0 if states > self.memory / SPILL_SHARE else (len(self.linears) + 3) * states
        head = self.vocabulary * self.hidden * (self.item + self.stored) + 4 * 4.0 * batch * self.vocabulary
        return max(self._walked(), head - self._graph(batch, length)) + kept

    def _graph(self, batch: int, length: int) -> float:
        """What one batch leaves in a block for the way back, beside inputs and gradients of the linears."""
        return self._activations(batch, length) + 3 * 4.0 * batch * self.heads * length

    def distill_bytes(self) -> float:
        settings, tuned = self.recipe.calibration, sum(x.parameters for block in self.linears for x in block)
        rows = max(1, min(DISTILL_ROWS, DISTILL_LOGITS // (4 * self.vocabulary * settings.length)))
        tokens = rows * settings.length
        # Dense weights, and of every tuned one its gradient, how far its code has moved, and what it started from.
        weights = self.total * self.item + tuned * (self.item + 4 + 3) + 24 * self.largest
        states = settings.rows * settings.length * self.hidden * self.item
        blocks = len(self.linears) * tokens * (6 * self.widest + 12 * self.hidden) * self.item
        return KEPT_BY_ALLOCATOR * (weights + states + blocks + 7 * 4.0 * tokens * self.vocabulary)

    def evaluate_bytes(self) -> float:
        settings = self.recipe.evaluate
        # lm-eval holds the logits of a batch, their log-softmax, and that of the batch before.
        scored = 3 * settings.batch_size * min(self.decoder.max_length, EVALUATED_AT_ONCE)
        row = settings.divergence_length
        compared = 2 * max(row, min(4 * row, LOGITS_BYTES / (4 * self.vocabulary))) + 6 * POSITIONS
        logits = 4.0 * self.vocabulary * max(scored, compared)
        # The unquantized model beside another.
        return EVALUATION_LOADS + 2 * self.total * self.item + KEPT_BY_ALLOCATOR * logits

    def _detected_tokens(self) -> list[int]:
        """Tokens of every set of rows that detection walks with."""
        settings = self.recipe.detect
        rows = settings.rows * settings.length
        return [rows, rows, 20 * settings.length, settings.long_rows * settings.long_length]

    def _walked(self) -> float:
        """A block that is being walked: cast tensor by tensor, its stored values gone."""
        kept = self.block * self.stored if self.item <= self.stored else self.tensor * self.stored
        return self.block * self.item + kept

    def _activations(self, tokens: int, length: int) -> float:
        """What a block's forward pass holds for one batch: of the MLP, and of attention by chunks of queries."""
        mlp = tokens * (4 * self.widest + 8 * self.hidden) * self.item
        return mlp + 5 * 4 * tokens / max(length, 1) * self.heads * min(length, 128) * length


def _read_at_once(decoder: Decoder) -> int:
    """Weights of a block that are in memory together where no rows walk: its experts come a few at a time."""
    most = 0
    for name, block in zip(decoder.block_names, decoder.blocks, strict=True):
        fused = sum(parameter.numel() for parameter in fused_parameters(decoder.model, (name,)).values())
        alone = {part: one for part, one in decoder.experts.items() if part.startswith(f"{name}.")}
        groups = [sum(alone[part].weight.numel() for part in group) for group in in_groups(alone, TOGETHER)]
        most = max(most, sum(p.numel() for p in block.parameters()) - fused, *groups)
    return most


def _input(linear: LinearShape, index: int) -> str:
    """What linears with one Hessian in memory have in common: engines fuse them, or they are experts, whose turn comes
    one after the other."""
    return linear.part_of or (linear.fused_with[0] if linear.fused_with else str(index))
