"""A KV cache of 2 bits as an attack on the sinks, and what defends them there: pinned tokens and an exact prefix."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.artifacts.diagnosis import Check
from sinkquant.cache import cached_logits, given_prefix, make_prefix, prepare
from sinkquant.cache.prefix import fingerprint
from sinkquant.diagnose.rows import with_bos
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.recipe import KVCache, Recipe

LARGEST = 1_000_000_000
"""Parameters of the largest model that is copied for this: the cache's hooks stay on a model for good."""
SETTINGS = ("kv_cache.key_bits=2", "kv_cache.value_bits=2", "kv_cache.group_size=32", "kv_cache.window=32")
SHORTEST = 96
"""A window, a block, and as much of a second one: the first packed tokens are read by a third of the row."""
DEFENCES: tuple[tuple[str | None, str], ...] = (
    (None, "kv_cache.exact=none"), ("detected sinks pinned in the cache", "kv_cache.exact=detected"),
    ("keys and values of <bos> from the unquantized model", "kv_cache.prefix=bos"))


def cache_defences(model: PreTrainedModel, text: torch.Tensor, bos: int, sink_map: SinkMap,
                   original: PreTrainedModel, notes: list[str]) -> list[Check]:
    """Loss through a 2-bit cache, on the text and on the text with more `<bos>` in its first half, by defence.

    Args:
        text: int64 [rows, length] without any `<bos>`.
        original: the unquantized model, which may be `model` itself.
        notes: is told where its prefix does not fit `model`, so that this defence is left out.

    Raises:
        RequestError: the model is too large to be copied, its cache cannot be packed, or the rows are too short.
    """
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise RequestError(f"the cache's defences are measured on models of at most {LARGEST:,} parameters.")
    if text.shape[1] < SHORTEST:
        raise RequestError(f"rows of {text.shape[1]} tokens are too short: {SHORTEST} are needed to fill a block.")
    shape, half = Decoder.of(model).shape(""), text.shape[1] // 2
    held = given_prefix(model)
    prefix = held or make_prefix(original, [bos])
    fits = fingerprint(model, [bos]) == prefix.model if held is None else held.ids == (bos,)
    if not fits:
        why = "token embedding or blocks are no longer the unquantized model's" if held is None else (
            "KV prefix is of other tokens")
        notes.append(f"an exact prefix in a 2-bit KV cache was not measured: this checkpoint's {why}; one that is made "
                     "with kv_cache.prefix=bos and weights.embeddings=16 holds a prefix that fits")
    found = []
    inputs = {"the text": [0], "4 more <bos> in the first half": [0, *range(half // 5, half, half // 5)][:5]}
    for what, places in inputs.items():
        rows = with_bos(text, bos, places)
        with torch.no_grad():
            reference = _loss(lambda row: model(row.to(model.device), use_cache=False).logits, rows, half)
        if reference is None:
            raise SinkquantError("the untouched text already gives outputs that are not finite.")
        for defence, setting in DEFENCES if fits else DEFENCES[:-1]:
            recipe = Recipe(kv_cache=KVCache()).replace([*SETTINGS, "kv_cache.exact=none", setting])
            plan = make_kv_plan(shape, sink_map, recipe)
            assert plan is not None
            twin = prepare(copy.deepcopy(model), prefix if plan.prefix and held is None else None)
            loss = _loss(functools.partial(_through_cache, twin, plan), rows, half)
            found.append(Check(name="2-bit KV cache", what=what, defence=defence, loss=loss,
                               reference_loss=reference, sink_rate=None, reference_sink_rate=None,
                               finite=loss is not None))
    return found


def _through_cache(model: PreTrainedModel, plan: KVCachePlan, row: torch.Tensor) -> torch.Tensor:
    return cached_logits(model, row.to(model.device), plan)


def _loss(logits_of: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, half: int) -> float | None:
    """Mean over the second half of the text, which ends every row; None where an output is not finite.

    Args:
        logits_of: [1, length] ids -> [1, length, vocabulary]; row by row, since a vocabulary may be large.
    """
    scored, losses = rows.shape[1] - half, []
    for row in rows:
        logits = logits_of(row[None])[0]
        if not torch.isfinite(logits).all():
            return None
        losses.append(torch.nn.functional.cross_entropy(logits[-scored - 1:-1].float().cpu(), row[-scored:]).double())
    return float(torch.stack(losses).mean())
