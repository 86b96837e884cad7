"""What of a plan is known before a weight is read, and whether its calibration text will do."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import ModelShape, Plan, SinkMap
from sinkquant.models import Decoder, read_text, token_rows
from sinkquant.policy import accept_edited, make_plan, plan_from_shapes
from sinkquant.policy.headers import nothing_found
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.policy.plan import choices_of
from sinkquant.recipe import Recipe


def plan_ready(shape: ModelShape, recipe: Recipe, edited: Plan | None,
               sink_map: SinkMap | None) -> tuple[Plan | None, list[str]]:
    """The plan, where headers and configuration are enough to make it.

    Args:
        edited, sink_map: the plan and the sink map that were given, if any.

    Returns:
        the plan and an empty list; or None and the settings that ask for detection or sensitivities.

    Raises:
        RequestError: the plan cannot be made for this model.
    """
    if edited is not None:
        return accept_edited(edited, shape), []
    if recipe.prune.blocks is not None:
        return None, ["prune.blocks"]
    if recipe.solves_cache:
        make_kv_plan(shape, nothing_found(shape), recipe)  # refuses what no setting can meet
        return None, ["kv_cache.bits"]
    if recipe.budget.solved:
        return None, ["budget"]
    if recipe.solves_inputs:
        choices_of(shape, nothing_found(shape), recipe)  # as above
        return None, ["activations.bits"]
    if sink_map is not None:
        return make_plan(shape, sink_map, recipe), []
    return plan_from_shapes(shape, recipe)


def with_calibration_notes(plan: Plan, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None) -> Plan:
    """The plan with notes that say where less calibration is given than was asked for.

    Raises:
        RequestError: the text does not hold a row.
    """
    return plan.model_copy(update={"notes": [*plan.notes, *_notes(plan, decoder, tokenizer)]})


def _notes(plan: Plan, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if not plan.needs_rows:
        return []
    if tokenizer is None:
        return ["the model folder has no tokenizer; carrying this plan out takes one"]
    settings = plan.calibration
    length = min(settings.length, decoder.max_length)
    rows = token_rows(tokenizer, read_text(settings.text, "calibration", tokenizer), settings.rows, length,
                      settings.bos, decoder.vocabulary)
    notes = []
    if length < settings.length:
        notes.append(f"calibration rows have {length} tokens instead of {settings.length}: that is the model's context")
    if len(rows) < settings.rows:
        notes.append(f"the calibration text holds {len(rows)} rows of {length} tokens; {settings.rows} were asked for")
    return notes
