"""What a plan's KV cache rotates by, from the plan's calibration rows, and a model that is given it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Calibration, KVCachePlan, Plan
from sinkquant.cache import Bases, find_bases, make_prefix, needs_bases, prepare
from sinkquant.cache.bases import ROWS
from sinkquant.errors import RequestError
from sinkquant.models import ActivationStore, Decoder, Walk
from sinkquant.quantize.rows import text_rows

BATCH_ROWS = 4

NO_TOKENIZER_FOR_BASES = ("kv_cache.rotate 'covariance' needs calibration rows; hand over the tokenizer, or use "
                          "'hadamard'.")


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
        raise RequestError(NO_TOKENIZER_FOR_BASES)
    rows = text_rows(decoder, calibration, tokenizer, ROWS)
    return find_bases(Walk(decoder, rows, BATCH_ROWS, device, dtype, store=store), plan)


def prepare_cache(model: PreTrainedModel, source: PreTrainedModel, plan: Plan,
                  tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Give a model what its plan's cache needs of the unquantized one, as its checkpoint would have it.

    Args:
        source: the unquantized model, its weights rotated as the plan says; may be the model itself.

    Returns:
        the model.

    Raises:
        RequestError: too little text.
    """
    cache = plan.kv_cache
    if cache is None or not (cache.prefix or needs_bases(cache)):
        return model
    bases = cache_bases(Decoder.of(source), cache, plan.calibration, tokenizer, str(source.device), source.dtype)
    return prepare(model, make_prefix(source, cache.prefix) if cache.prefix else None, bases)
