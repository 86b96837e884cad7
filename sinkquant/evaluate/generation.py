"""Divergence over a continuation that goes through the KV cache token by token, as generation fills it.

A pass over whole rows, or chunks, sees what packing loses once; while a model writes, every new token is computed from
packed keys and values and leaves its own behind, so that errors can add up (KVarN 2606.03458). The text is given
(teacher-forced): both models see the same tokens, and what is compared is what they expect next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import SinkCache, prepare, put_in_front
from sinkquant.errors import RequestError
from sinkquant.evaluate.candidate import BASELINE, Candidate
from sinkquant.evaluate.divergence import token_figures
from sinkquant.evaluate.positions import by_position
from sinkquant.evaluate.shelf import Shelf
from sinkquant.evaluate.states import last_states
from sinkquant.models import token_rows, vocabulary_of
from sinkquant.models.head import OutputHead, headless
from sinkquant.recipe import Recipe


class HalfCache(DynamicCache):
    """Keys and values in bfloat16, whatever the model computes in: what a cache that is not quantized loses."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Round new keys and values to bfloat16; see `transformers.Cache.update`."""
        rounded = (states.to(torch.bfloat16).to(states.dtype) for states in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


def continued_states(model: PreTrainedModel, rows: torch.Tensor, prompt: int, cache: Cache,
                     front: Sequence[int] = ()) -> torch.Tensor:
    """What the output head is given, [rows, length, hidden_size]: the prompt in one pass, the rest one by one.

    Args:
        rows: int64 [rows, length]. prompt: tokens of it that are read at once.
        front: what is put in front of every row, and has no states in the result.
    """
    ids, _ = put_in_front(rows.to(model.device), None, list(front))
    begin = prompt + len(front)
    with torch.no_grad(), headless(model) as seen:
        for chunk in (ids[:, :begin], *ids[:, begin:].split(1, dim=1)):
            model(chunk, past_key_values=cache, use_cache=True)
        return torch.cat(seen, dim=1)[:, len(front):]


def continuation_kl(baseline: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor, prompt: int,
                    kv: KVCachePlan | None) -> torch.Tensor:
    """KL(baseline || other) in nats, float64 [rows, length - prompt], by distance from the prompt.

    The baseline reads the rows in one pass, in its own dtype.

    Args:
        kv: how the other's cache is packed; None for one in bfloat16.
    """
    if kv is not None:
        prepare(other)
    # Each row keeps sinks of its own of what is dropped.
    batches = rows.split(1) if kv is not None and kv.evict is not None else [rows]
    continued = [continued_states(other, batch, prompt, HalfCache(config=other.config) if kv is None else
                                  SinkCache(other.config, kv), () if kv is None else kv.front) for batch in batches]
    (figures,) = token_figures([OutputHead(baseline), OutputHead(other)],
                               [last_states(baseline, rows), torch.cat(continued)], rows)
    return figures.kl[:, prompt:]


def require_room(recipe: Recipe, limit: int) -> None:
    """Raises RequestError where the model has no positions for a prompt and its continuation."""
    settings = recipe.evaluate
    asked = settings.generation_prompt + settings.generation_tokens
    if settings.generation_rows and asked > limit:
        raise RequestError(f"evaluate.generation_prompt and generation_tokens are {asked} tokens together, and the "
                           f"model has positions for {limit}; ask for fewer.")


def continued_rows(vocabulary: int, tokenizer: PreTrainedTokenizerBase, content: str, recipe: Recipe) -> torch.Tensor:
    """Prompts with what continues them, int64 [rows, length].

    Raises:
        RequestError: the text is too short for one, or the tokenizer is of a larger vocabulary.
    """
    settings = recipe.evaluate
    return token_rows(tokenizer, content, settings.generation_rows,
                      settings.generation_prompt + settings.generation_tokens, recipe.calibration.bos, vocabulary,
                      "evaluation text", "evaluate.generation_tokens")


def measure_generation(candidates: Sequence[Candidate], shelf: Shelf, tokenizer: PreTrainedTokenizerBase, content: str,
                       recipe: Recipe, next_step: Callable[[str], None]) -> None:
    """Fill `continued` of the unquantized model, whose cache is in bfloat16, and of all candidates with a packed cache.

    Args:
        content: the evaluation text.
        next_step: is told what begins.
    """
    settings = recipe.evaluate
    base = next(candidate for candidate in candidates if candidate.name == BASELINE)
    baseline = shelf.get(base.load)
    rows = continued_rows(vocabulary_of(baseline), tokenizer, content, recipe)
    for candidate in generating(candidates):
        next_step(f"{candidate.name}: generation")
        candidate.continued = by_position(continuation_kl(baseline, shelf.get(candidate.load), rows,
                                                          settings.generation_prompt, candidate.kv))


def generating(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those whose continuation is measured: none where there is no baseline, or nothing with a packed cache."""
    if BASELINE not in {candidate.name for candidate in candidates}:
        return []
    packed = [candidate for candidate in candidates if candidate.kv is not None]
    return [one for one in candidates if one.name == BASELINE or one in packed] if packed else []
