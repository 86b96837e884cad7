"""The selector of sinks: token ids, positions and hidden states in, a mask out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from sinkquant.artifacts import MassiveCarriers


class Selects(Protocol):
    """What says of one sink where it stands: a sink of a sink map, of a plan, or a candidate."""

    @property
    def token_id(self) -> int | None:
        """Its token, or None for any."""

    @property
    def position(self) -> int | None:
        """Its place in the row, or None for any."""


@dataclass(frozen=True)
class SinkSelector:
    """Selects the sinks among tokens.

    Attributes:
        sinks: a token id, a position, or an id at a position. One with neither is a learned column: it stands nowhere.
        carriers: a token is a sink as well where its hidden state after the emergence block carries a massive
            activation (KVSink 2508.04257).
    """

    sinks: tuple[tuple[int | None, int | None], ...] = ()
    carriers: MassiveCarriers | None = None

    @classmethod
    def of(cls, sinks: Iterable[Selects], carriers: MassiveCarriers | None = None) -> SinkSelector:
        """The selector of sinks from anywhere."""
        return cls(tuple((sink.token_id, sink.position) for sink in sinks), carriers)

    def each(self) -> Iterator[SinkSelector]:
        """A selector of every sink alone."""
        return (SinkSelector((sink,)) for sink in self.sinks)

    @property
    def needs_ids(self) -> bool:
        """Whether a sink is known by its token."""
        return any(token_id is not None for token_id, _ in self.sinks)

    def mask(self, ids: torch.Tensor | None = None, positions: torch.Tensor | None = None,
             hidden: torch.Tensor | None = None) -> torch.Tensor:
        """bool [rows, length]: which tokens are sinks. Padding never is.

        Args:
            ids: int64 [rows, length]; not needed where no sink is known by its token.
            positions: int64 [rows, length], places in the row, padding not counted and negative; None for rows that
                begin with position 0 and have no padding.
            hidden: [rows, length, hidden_size] after the emergence block; None leaves carriers out.

        Raises:
            ValueError: nothing says which tokens there are, or ids are needed.
        """
        shown = next((x.shape[:2] for x in (ids, positions, hidden) if x is not None), None)
        if shown is None or (ids is None and self.needs_ids):
            raise ValueError("sinks are known by their token, and no token ids were given")
        device = next(x.device for x in (ids, positions, hidden) if x is not None)
        if positions is None:
            positions = torch.arange(shown[1], device=device).expand(shown)
        found = torch.zeros(shown, dtype=torch.bool, device=device)
        for token_id, position in self.sinks:
            if token_id is None and position is None:
                continue
            here = torch.ones_like(found) if position is None else positions == position
            found |= here if token_id is None else here & (ids == token_id)
        if self.carriers is not None and hidden is not None:
            sizes = hidden[..., self.carriers.channels].float().abs()
            found |= (sizes >= sizes.new_tensor(self.carriers.thresholds)).any(-1)
        return found & (positions >= 0)
