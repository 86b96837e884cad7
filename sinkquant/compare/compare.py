"""Checkpoints and their baseline -> Comparison. One checkpoint at a time is in memory beside the baseline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Measure, SinkMap
from sinkquant.artifacts.comparison import ComparedRow, Comparison
from sinkquant.compare.checkpoint import Checkpoint, open_checkpoints
from sinkquant.compare.figures import (
    Reference,
    divergence_figures,
    exponential,
    neighbours,
    over_rows,
    warnings,
    with_front,
)
from sinkquant.compare.tasks import Scorer, scored_tasks
from sinkquant.detect import detect
from sinkquant.diagnose.fidelity import SinkComparison
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.evaluate import TokenFigures, held_out_rows, require_tasks_possible
from sinkquant.evaluate.divergence import BATCH_ROWS, require_vocabulary
from sinkquant.evaluate.shelf import share_equal
from sinkquant.evaluate.states import last_states
from sinkquant.formats import versions
from sinkquant.models import load_model, load_tokenizer, max_length, pick_device, read_text, vocabulary_of
from sinkquant.models.blocks import same_heads
from sinkquant.models.corpus import in_words
from sinkquant.models.folder import require_baseline
from sinkquant.models.gguf import source_notes
from sinkquant.models.loading import read_config
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress, Steps
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import reading_notes


@own_numerics()
def compare(checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], baseline: str | os.PathLike[str], *,
            text: str | os.PathLike[str] | list[str] | None = None, tasks: Sequence[str] = (),
            recipe: Recipe | None = None, sink_map: SinkMap | None = None, sinks: bool = True,
            trust_remote_code: bool = False, progress: Progress | None = None) -> Comparison:
    """Measure any number of checkpoints on the same rows of text, beside one unquantized model.

    Divergence is KL(baseline || checkpoint) of the next token in nats; intervals are Student's over rows, 95 %.

    Args:
        checkpoints: one or more run folders, checkpoints of any format that `sinkquant.load` reads, or GGUF files.
        baseline: the unquantized model.
        text: a file of evaluation text; None: the recipe's, or the packaged one.
        tasks: lm-eval tasks to score all models on; none named: the recipe's.
        recipe: how to measure (`evaluate`, `compute`, `calibration.bos`); None: `Recipe.for_comparison()`.
        sink_map: of the baseline; None: one that a checkpoint carries, or detected now. sinks: whether sink fidelity
            is measured at all.

    Raises:
        RequestError: no checkpoint, one twice, one that is not read here or is of another vocabulary; a baseline that
            is quantized.
        SinkquantError: a model predicts something that is not finite.
    """
    several = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    named, baseline = [os.fspath(one) for one in several], os.fspath(baseline)
    if not named:
        raise RequestError("there is nothing to compare; name one checkpoint or more.")
    asked: dict[str, Any] = {"tasks": list(tasks)} if tasks else {}
    recipe = (recipe or Recipe.for_comparison()).changed(evaluate=asked | (
        {} if text is None else {"text": text if isinstance(text, list) else os.fspath(text)}))
    opened, (base,) = open_checkpoints(named), open_checkpoints([baseline])
    require_baseline(base.folder)
    tokenizer = load_tokenizer(base.folder, trust_remote_code)
    if recipe.evaluate.tasks or recipe.evaluate.task_folder is not None:
        require_tasks_possible(recipe, tokenizer)
    content = read_text(recipe.evaluate.text, "evaluation", tokenizer)
    steps = Steps(len(opened) + 3, progress, "comparing", "compared")
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    steps.next("the unquantized model")
    original = load_model(base.folder, dtype, device, trust_remote_code)
    room = max_length(original) - max(len(one.kv.front) if one.kv else 0 for one in opened)
    rows = held_out_rows(vocabulary_of(original), tokenizer, content, recipe, room)
    if len(rows) < 2:
        raise RequestError("the evaluation text holds but one row, and intervals need two; give more text or a smaller "
                           "evaluate.divergence_length.")
    reference = Reference.of(original, rows)
    measured = _Measured(reference, sum(parameter.numel() for parameter in original.parameters()))
    fidelity = _fidelity(original, tokenizer, opened, sink_map, recipe, base.named) if sinks else None
    with scored_tasks(recipe, tokenizer, content, room) as score:
        scores = score(original, None) if score else {}
        found = []
        for one in opened:
            steps.next(one.name)
            found.append(_checkpoint_row(measured, one, score, fidelity, recipe, trust_remote_code))
    steps.next("the noise floor")
    floor, unknown = _noise_floor(measured, base, rows, recipe, trust_remote_code)
    steps.end()
    pairs = neighbours(measured.kl)
    front = _baseline_row(measured, base, scores)
    said = [f"{one.name}: {note}" for one in opened for note in reading_notes(one.named)]
    facts: dict[str, str | int | float | bool | None] = {
        "text": in_words(recipe.evaluate.text) or "packaged evaluation text",
        "rows": len(rows), "length": rows.shape[1],
        "tokens": rows.numel(), "dtype": recipe.compute.dtype, "seed": recipe.seed}
    return Comparison(model=baseline, rows=[front, *with_front(found), *floor], pairs=pairs,
                      warnings=[*source_notes(base.folder), *said, *unknown, *warnings(found, floor, pairs)],
                      facts=facts, versions=versions())


class _Measured:
    """Rows of the table as they are measured, and the divergence of every checkpoint by row of text."""

    def __init__(self, reference: Reference, parameters: int) -> None:
        self.reference, self.parameters = reference, parameters
        self.kl: dict[str, torch.Tensor] = {}
        self.losses = torch.empty(0)

    def row(self, one: Checkpoint, name: str, kind: str, tokens: TokenFigures, **more: Any) -> ComparedRow:
        self.losses = tokens.baseline_loss.mean(1)
        if kind == "checkpoint":
            self.kl[name] = tokens.kl.mean(1)
        return ComparedRow.model_validate({
            "name": name, "path": one.named, "kind": kind, "format": one.form, "bytes": one.bytes,
            "bits_per_weight": 8 * one.bytes / self.parameters, **divergence_figures(tokens), **more})


def _baseline_row(measured: _Measured, base: Checkpoint, tasks: dict[str, dict[str, Measure]]) -> ComparedRow:
    """The baseline, with what it lost on the text beside the last that was compared with it."""
    return ComparedRow.model_validate({
        "name": "unquantized", "path": base.named, "kind": "baseline", "format": base.form, "bytes": base.bytes,
        "bits_per_weight": 8 * base.bytes / measured.parameters, "tasks": tasks,
        "perplexity": exponential(over_rows(measured.losses))})


def _checkpoint_row(measured: _Measured, one: Checkpoint, score: Scorer | None, fidelity: SinkComparison | None,
                    recipe: Recipe, trust_remote_code: bool) -> ComparedRow:
    original = measured.reference.model
    model = one.load(getattr(torch, recipe.compute.dtype), str(original.device), trust_remote_code)
    require_vocabulary(model, one.named, vocabulary_of(original))
    share_equal(original, model)
    tokens = measured.reference.against(model, one.kv)
    tasks: dict[str, dict[str, Measure]] = score(model, one.kv) if score else {}
    # Without a plan that says which blocks are left, or with other heads, nobody knows what to compare with what.
    alike = same_heads(original.config, model.config, one.kept)
    sinks = fidelity.compare(model, one.kept) if fidelity is not None and alike else None
    return measured.row(one, one.name, "checkpoint", tokens, tasks=tasks, sinks=sinks.verdict if sinks else None,
                        sinks_sentence=sinks.sentence if sinks else None,
                        kv_bits=one.kv.bits_per_value if one.kv else 16.0)


def _noise_floor(measured: _Measured, base: Checkpoint, rows: torch.Tensor, recipe: Recipe,
                 trust_remote_code: bool) -> tuple[list[ComparedRow], list[str]]:
    """The unquantized model beside itself: with rows in other batches, and in another dtype. And what could not be
    measured, in words."""
    original = measured.reference.model
    one_by_one = [last_states(original, row) for row in rows.split(1)]
    regrouped = [torch.cat(one_by_one[start:start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS)]
    found = [measured.row(base, "unquantized, rows one by one", "floor",
                          measured.reference.against(original, given=regrouped))]
    other = _other_dtype(base.folder, recipe, trust_remote_code)
    model = load_model(base.folder, other, str(original.device), trust_remote_code)
    name = f"unquantized in {str(other).removeprefix('torch.')}"
    try:
        tokens = measured.reference.against(model)
    except SinkquantError as error:  # float16 overflows where float32 does not
        return found, [f"{name}: not a row of this table, since {str(error).rstrip('.')}"]
    return [*found, measured.row(base, name, "floor", tokens)], []


def _other_dtype(folder: Path, recipe: Recipe, trust_remote_code: bool) -> torch.dtype:
    """The one that the model is stored in, where it is computed in another; else bfloat16, or float32."""
    mine = getattr(torch, recipe.compute.dtype)
    stored = getattr(read_config(folder, trust_remote_code).get_text_config(decoder=True), "dtype", None)
    if isinstance(stored, torch.dtype) and stored != mine:
        return stored
    return torch.float32 if mine == torch.bfloat16 else torch.bfloat16


def _fidelity(original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opened: Sequence[Checkpoint],
              sink_map: SinkMap | None, recipe: Recipe, name: str) -> SinkComparison:
    """Looks at the sinks of the original once, for all checkpoints."""
    known = sink_map or next((one.sinks for one in opened if one.sinks is not None), None)
    if known is None:
        fast = recipe.changed(detect={"super_weights": False}, prune={"heads": "none"})
        known = detect(original, tokenizer, recipe=fast, name=name)
    return SinkComparison(original, tokenizer, known.tokens, recipe)
