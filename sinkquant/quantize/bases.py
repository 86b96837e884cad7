"""What a plan's KV cache rotates by, from the plan's calibration rows."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import Calibration, KVCachePlan
from sinkquant.cache import Bases, find_bases, needs_bases
from sinkquant.cache.bases import ROWS
from sinkquant.errors import RequestError
from sinkquant.models import ActivationStore, Decoder, Walk
from sinkquant.quantize.rows import text_rows

BATCH_ROWS = 4


def cache_bases(decoder: Decoder, plan: KVCachePlan | None, calibration: Calibration,
                tokenizer: PreTrainedTokenizerBase | None, device: str, dtype: torch.dtype,
                store: ActivationStore | None = None) -> Bases | None:
    """The matrices of a plan's cache, or None where it needs none.

    Args:
        decoder: of the unquantized model, its weights rotated as the plan says.

    Raises:
        RequestError: no tokenizer, or too little text.
    """
    if plan is None or not needs_bases(plan):
        return None
    if tokenizer is None:
        raise RequestError("kv_cache.rotate 'covariance' needs calibration rows; hand over the tokenizer, or use "
                           "'hadamard'.")
    rows = text_rows(decoder, calibration, tokenizer, ROWS)
    return find_bases(Walk(decoder, rows, BATCH_ROWS, device, dtype, store=store), plan)
