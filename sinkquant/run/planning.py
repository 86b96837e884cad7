"""Whether the calibration text of a plan will do."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.models import Decoder
from sinkquant.quantize.rows import text_rows


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
    rows = text_rows(decoder, settings, tokenizer)
    notes = []
    if length < settings.length:
        notes.append(f"calibration rows have {length} tokens instead of {settings.length}: that is the model's context")
    if len(rows) < settings.rows:
        notes.append(f"the calibration text holds {len(rows)} rows of {length} tokens; {settings.rows} were asked for")
    return notes
