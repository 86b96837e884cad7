"""Which tokens stay exact: one small class per policy. All of them see the prompt that is being read, not a guess.

A policy flags columns; the cache keeps at most `max_exact` of them per row, the first ones first, and takes them out of
their group before its range is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sinkquant.artifacts.kv import KVCachePlan, KVSink, MassiveCarriers
from sinkquant.errors import RequestError
from sinkquant.sinks import SinkSelector


@dataclass(frozen=True)
class NewTokens:
    """What is known of the columns that a forward pass adds.

    Attributes:
        positions: int64 [batch, new], place in the row, padding not counted; negative for padding.
        ids: int64 [batch, new] token ids, or None where the model was given embeddings or is not watched.
    """

    positions: torch.Tensor
    ids: torch.Tensor | None


@dataclass(frozen=True)
class FirstN:
    """The first n tokens of every row (StreamingLLM 2309.17453; what kvpress and SKVQ 2405.06219 assume); 0 of them in
    the control."""

    n: int

    def flags(self, new: NewTokens) -> torch.Tensor:
        """bool [batch, new]. Rows start after their padding."""
        return (new.positions >= 0) & (new.positions < self.n)


@dataclass(frozen=True)
class Detected:
    """The tokens of the sink map: an id, a position, or an id at a position, wherever they stand in this prompt."""

    sinks: tuple[KVSink, ...]

    def flags(self, new: NewTokens) -> torch.Tensor:
        """bool [batch, new]. Raises RequestError where a sink is known by a token that the cache was not shown."""
        selector = SinkSelector.of(self.sinks)
        if new.ids is None and selector.needs_ids:
            raise RequestError("the KV cache keeps sinks by their token id, but was not shown the tokens; pass "
                               "input_ids, and call sinkquant.cache.prepare(model) once before generating.")
        return selector.mask(new.ids, new.positions)


@dataclass(frozen=True)
class Massive:
    """The tokens of this prompt that carry a massive activation after the emergence block (KVSink 2508.04257). Their
    flags come from a hook on that block; see `sinkquant.cache.prepare`."""

    carriers: MassiveCarriers

    def flags(self, new: NewTokens) -> None:
        """None: the verdict comes later in the same forward pass."""
        return None

    def verdict(self, hidden: torch.Tensor) -> torch.Tensor:
        """bool [batch, new] from the hidden states [batch, new, hidden] after the emergence block."""
        return SinkSelector(carriers=self.carriers).mask(hidden=hidden)


def exact_tokens(plan: KVCachePlan) -> FirstN | Detected | Massive:
    """The policy that a plan names.

    Raises:
        RequestError: "massive" without a massive channel.
    """
    if plan.exact == "detected":
        return Detected(tuple(plan.sinks))
    if plan.exact == "massive":
        if plan.massive is None or not plan.massive.channels:
            raise RequestError("kv_cache.exact is 'massive', but no massive channel was found in this model; use "
                               "'detected' or 'first-n'.")
        return Massive(plan.massive)
    return FirstN(plan.first_n if plan.exact == "first-n" else 0)
