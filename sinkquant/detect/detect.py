"""model + text -> SinkMap."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.detect.detector import Detector, Found, Progress
from sinkquant.detect.detectors import detectors_of
from sinkquant.detect.massive import EXCEPTION
from sinkquant.detect.survey import Surveyor
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, check_finite, read_text, require_dense, token_rows, tokenization_facts
from sinkquant.models.gguf import source_notes
from sinkquant.models.numerics import own_numerics
from sinkquant.models.source import folder_of
from sinkquant.models.text import left_out
from sinkquant.recipe import Detection, Recipe

REPEATED_ROWS = 20
REPEATS_ONE_TOKEN = 0.95


@own_numerics()
def detect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | list[str] | None = None,
           recipe: Recipe | None = None, name: str | None = None, progress: Progress | None = None) -> SinkMap:
    """Find the sink tokens, heads, massive channels and super weights of a model.

    Args:
        model: any decoder whose attention goes through transformers' attention interface, in any dtype. Its weights
            are not changed.
        text: a file of natural text; None for the recipe's calibration text, or the packaged prose.
        recipe: thresholds, rows, seed, device and compute dtype; None for the defaults.
        name: what the sink map calls the model; None for the model's own name.
        progress: called as progress(done, total, label).

    Raises:
        RequestError: the architecture is not supported, the text is too short, or weights are not finite or packed.
    """
    recipe = recipe or Recipe()
    settings = recipe.detect
    decoder = Decoder.of(model)
    require_dense(model)
    check_finite(model)
    detectors = detectors_of(decoder, recipe)
    surveyor = Surveyor(decoder, recipe, progress, detectors)
    content = read_text(text or recipe.calibration.text, "calibration", tokenizer)
    rows = surveyor.rows(tokenizer, content, settings.rows, settings.length)
    evaluation = None
    if recipe.prune.heads != "none":
        evaluation = token_rows(tokenizer, read_text(recipe.evaluate.text, "evaluation", tokenizer), len(rows),
                                rows.shape[1], recipe.calibration.bos, decoder.vocabulary, "evaluation text",
                                "detect.length")
    long_rows = surveyor.long_rows(tokenizer, content)
    notes = source_notes(folder_of(model))
    if unsaid := left_out(tokenizer):
        notes.append(unsaid)
    ids, counts = rows[:, 1:].unique(return_counts=True)
    if float(counts.max()) / rows[:, 1:].numel() > REPEATS_ONE_TOKEN:
        # Gu et al.'s negative control repeats the token from the first position on; a <bos> would be its sink.
        rows, long_rows = ids[counts.argmax()].expand(len(rows), rows.shape[1]).clone(), None
        notes.append("the text repeats one token: its rows are the published negative control, without <bos>")
    elif long_rows is None and settings.long_rows and surveyor.long_length > rows.shape[1]:
        notes.append(f"the text holds no row of {surveyor.long_length} tokens: sinks were looked for in rows of "
                     f"{rows.shape[1]} tokens only")
    facts = tokenization_facts(tokenizer, rows)
    bare = None
    if facts.rows_start_with_bos:
        bare = token_rows(tokenizer, content, settings.rows, rows.shape[1], "never", decoder.vocabulary,
                          key="detect.length")
    first, long, repeated, without_bos = surveyor.run([rows, long_rows], [_repeated_rows(rows, recipe.seed), bare])
    assert first is not None
    assert repeated is not None
    found = Found(decoder, tokenizer, recipe, surveyor.device, surveyor.dtype, facts,
                  [survey for survey in (first, long) if survey is not None], repeated, without_bos, progress,
                  evaluation, notes=notes)
    nulls: dict[str, str] = {}
    extensions: dict[str, dict[str, Any]] = {}
    for detector in detectors:
        if detector.name is None:
            found.fields |= detector.result(found)
            nulls |= dict.fromkeys(detector.fields, detector.null)
        else:
            extensions[detector.name] = _of_another_package(detector, found)
            nulls[detector.name] = detector.null
    return SinkMap(model=decoder.facts(name or model.config.name_or_path or type(model).__name__), tokenization=facts,
                   thresholds=_thresholds(settings), notes=found.notes, nulls=nulls, extensions=extensions,
                   **found.fields)


def _of_another_package(detector: Detector, found: Found) -> dict[str, Any]:
    result = detector.result(found)
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise RequestError(f"what the detector {detector.name!r} found cannot be written as JSON ({e}); mend the "
                           "package that brings it.") from e
    return result


def _thresholds(settings: Detection) -> dict[str, float]:
    return {"sink_score": settings.threshold, "massive_ratio": settings.massive_ratio,
            "column_ratio": settings.column_ratio, "no_op_sink_score": settings.no_op_sink_score,
            "no_op_output_norm": settings.no_op_output_norm, "super_weight_loss": settings.super_weight_loss,
            "outlier_ratio": settings.outlier_ratio, "massive_exception": EXCEPTION}


def _repeated_rows(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The negative control of Gu et al.: rows in which one token of the text repeats, without any <bos>."""
    ids = rows[:, 1:].unique()
    generator = torch.Generator().manual_seed(seed)
    picked = ids[torch.randperm(len(ids), generator=generator)[:REPEATED_ROWS]]
    return picked[:, None].expand(-1, rows.shape[1]).clone()
