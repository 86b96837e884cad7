"""Heads that do nothing: what their removal changes, and which of them a plan takes out."""

from __future__ import annotations

from pydantic import Field

from sinkquant.artifacts.base import Strict


class HeadAblation(Strict):
    """A query head that is a no-op on every text, and what its removal does to the loss.

    `module` is the output projection that reads the head, `start` and `stop` the input columns that it reads there.
    `loss_change`: mean over tokens of |loss without the head - loss with it|, nats per token; `together`: the same
    with all heads before it in the list taken out as well.
    """

    layer: int
    head: int
    module: str
    start: int
    stop: int
    loss_change: float
    together: float


class HeadAblations(Strict):
    """The no-op heads of a model, the one that changes least first. `texts` are those on which every one of them was
    one, `rows` the rows of each that the ablations ran on; `weights` [layer][head] is the norm of the output
    projection's columns of every head, by which a control may choose that knows nothing of attention."""

    texts: list[str]
    rows: int
    heads: list[HeadAblation]
    weights: list[list[float]] = Field(default_factory=list)


class SilencedHead(Strict):
    """A head whose columns of the output projection `module` become zero, `start` to `stop`."""

    layer: int
    head: int
    module: str
    start: int
    stop: int
    reason: str
