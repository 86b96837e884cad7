"""What a run will take: peak memory, from shapes and the recipe alone, before any weight is read; and time, which is
counted work at the pace that this machine shows with the model's first block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
from transformers import PreTrainedTokenizerBase

from sinkquant.costs import SPILL_SHARE, Pace, Sizes
from sinkquant.detect.costs import detect_bytes, detect_seconds
from sinkquant.errors import RequestError
from sinkquant.evaluate.costs import evaluate_bytes, evaluate_seconds
from sinkquant.models import Decoder, starts_with_bos
from sinkquant.predict.pace import measure
from sinkquant.quantize.costs import distill_bytes, quantize_bytes, quantize_seconds
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.costs import sensitivity_bytes

CHEAPER = ("evaluate.batch_size=1", "evaluate.skip=true", "calibration.batch_size=1", "detect.batch_size=1",
           "sensitivity.batch_size=1", "sensitivity.measure_rows=0", "sensitivity.rows=16", "sensitivity.kv_length=512",
           "compute.dtype=bfloat16", "weights.method=rtn", "weights.distill=0")
"""Settings that take less memory, in the order in which they are proposed."""
SENSITIVITIES = "find sensitivities"
"""The stage that only a budget that is solved for, a file of sensitivities, and advice have."""


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
    sizes = Sizes(decoder, recipe, memory_allowed(recipe))
    peaks = {"detect": detect_bytes(sizes), "quantize": quantize_bytes(sizes)}
    if recipe.needs_sensitivities if sensitivities is None else sensitivities:
        peaks[SENSITIVITIES] = sensitivity_bytes(sizes)
    if recipe.weights.distill:
        peaks["distill"] = distill_bytes(sizes)
    if not recipe.evaluate.skip:
        peaks["evaluate"] = evaluate_bytes(sizes)
    return Prediction(peaks)


def with_seconds(found: Prediction, decoder: Decoder, recipe: Recipe,
                 tokenizer: PreTrainedTokenizerBase) -> Prediction:
    """A prediction with the time of every stage: a few rows go through the first block, and small matrices are
    quantized, to see what this machine takes."""
    sizes = Sizes(decoder, recipe, memory_allowed(recipe))
    return replace(found, seconds=stage_seconds(sizes, measure(decoder, recipe, sizes.calibrated), tokenizer))


def stage_seconds(sizes: Sizes, pace: Pace, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Stage, under the name that it is timed by -> seconds."""
    evaluated = not sizes.recipe.evaluate.skip
    plans = ["sink_aware", *(["control"] if sizes.recipe.evaluate.control and evaluated else [])]
    bos = starts_with_bos(tokenizer, sizes.recipe.calibration.bos)
    found = {"detect": detect_seconds(sizes, pace, sizes.recipe.detect.super_weights, bos)}
    for name in plans:
        found[f"quantize {name}"] = quantize_seconds(sizes, pace)
        if evaluated:
            found[f"detect {name}"] = detect_seconds(sizes, pace, False, bos)
    if evaluated:
        found["evaluate"] = evaluate_seconds(sizes, pace, len(plans), tokenizer)
    return found


def _needed(changed: list[str], fits: Callable[[list[str]], bool]) -> list[str]:
    """Those of the settings without which it would not fit."""
    needed = list(changed)
    for setting in changed:
        fewer = [other for other in needed if other != setting]
        if fits(fewer):
            needed = fewer
    return needed
