"""The calibration rows of a plan."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import Calibration, Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, read_text, token_rows
from sinkquant.quantize.inputs import in_front
from sinkquant.quantize.ranks import my_rows

NO_TOKENIZER = "the plan uses a method that needs calibration rows; hand over the tokenizer."


def calibration_rows(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """This rank's share of the rows, int64 [rows, length].

    Raises:
        RequestError: no tokenizer, too little text, or rows that cannot be shared.
    """
    if tokenizer is None:
        raise RequestError(NO_TOKENIZER)
    return my_rows(in_front(text_rows(decoder, plan.calibration, tokenizer), plan, decoder.max_length), plan)


def text_rows(decoder: Decoder, settings: Calibration, tokenizer: PreTrainedTokenizerBase,
              most: int | None = None) -> torch.Tensor:
    """All rows of the calibration text, int64 [rows, length]. most: no more of them than that.

    Raises:
        RequestError: too little text.
    """
    content = read_text(settings.text, "calibration", tokenizer)
    return token_rows(tokenizer, content, min(settings.rows, most or settings.rows),
                      min(settings.length, decoder.max_length), settings.bos, decoder.vocabulary)
