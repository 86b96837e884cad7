"""Heads: the roles that they play; those that do nothing, what their removal changes, and which a plan takes out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Strict

Role = Literal["mixing", "switched", "positional", "information"]


class HeadRole(Strict):
    """What a query head does with its attention.

    `role` "mixing": it rests on the sinks at nearly every token, whatever the text, and so holds mixing back;
    "switched": it rests unless its condition holds; "positional": most of what it does not give to the sinks goes to
    one place counted from the token; "information": what it reads depends on more than that.
    `rests`: share of tokens at which the sinks get most of its attention. `explained`: the largest share of the
    variance of that mass that the token, or the one before it, explains; `explained_null`: with the tokens dealt out
    anew. `condition`: whose `tokens` wake a switched head, the token's own or the one before; most frequent first.
    `offset`: how far back the place lies that gets most of what the sinks do not get, 0 for the token itself;
    `offset_share` of it, and `offset_null` if it were spread evenly.
    """

    role: Role
    rests: float
    explained: float
    explained_null: float
    condition: Literal["token", "previous"] | None
    tokens: list[str]
    offset: int
    offset_share: float
    offset_null: float


class HeadAblation(Strict):
    """A query head that is a no-op on every text, and what its removal does to the loss.

    `module` is the output projection that reads the head, `start` and `stop` the input columns that it reads there.
    `loss_change`: mean over tokens of |loss without the head - loss with it|, nats per token; `together`: the same
    with all heads before it in the list taken out as well. `massive_left`: how much of the largest massive activation
    is left without it, 1 for all of it; null where there is none.
    """

    layer: int
    head: int
    module: str
    start: int
    stop: int
    loss_change: float
    together: float
    massive_left: float | None = None


class SparedHead(Strict):
    """A no-op head without which a massive activation loses more than half of its size, so that it stays."""

    layer: int
    head: int
    massive_left: float


class HeadAblations(Strict):
    """The no-op heads of a model, the one that changes least first. `texts` are those on which every one of them was
    one, `rows` the rows of each that the ablations ran on; `weights` [layer][head] is the norm of the output
    projection's columns of every head, by which a control may choose that knows nothing of attention. `spared` are
    no-ops that are not in the list since they make massive activations; none with `prune.massive`."""

    texts: list[str]
    rows: int
    heads: list[HeadAblation]
    weights: list[list[float]] = Field(default_factory=list)
    spared: list[SparedHead] = Field(default_factory=list)


class SilencedHead(Strict):
    """A head whose columns of the output projection `module` become zero, `start` to `stop`."""

    layer: int
    head: int
    module: str
    start: int
    stop: int
    reason: str
