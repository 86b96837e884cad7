"""Advice: what each kind of protection is worth on a model, as predicted and as measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict

Answer = Literal["pays", "does not pay", "nothing here", "not possible", "not measured"]


class PredictedWorth(Strict):
    """Predicted KL divergence from the unquantized model, nats per token, with a mechanism and without it. `at_best`:
    what is kept exact is taken to lose nothing through the sinks any more, so that the gain is a bound."""

    aware: float
    control: float
    at_best: bool = False

    @property
    def gain(self) -> float:
        """What the mechanism saves, nats per token."""
        return self.control - self.aware


class MeasuredWorth(Strict):
    """Mean KL divergence from the unquantized model on `rows` held-out rows, nats per token, with a mechanism and
    without it; `gain` is control - aware, with its 95 % paired bootstrap interval."""

    aware: float
    control: float
    gain: float
    low: float
    high: float
    rows: int


class MechanismAdvice(Strict):
    """One kind of protection beside a control of the same bytes.

    `applies_to`: what alone is quantized in the comparison. `settings`: recipe keys that turn it on. `weight_bytes`,
    `kv_bytes`: with it and without, null where nothing was planned or no cache is packed. `predicted` is null where
    nothing can be said before measuring, `measured` where nobody asked or nothing differs.
    """

    name: str
    applies_to: Literal["weights", "KV cache"]
    settings: list[str]
    weight_bytes: tuple[int, int] | None = None
    kv_bytes: tuple[int, int] | None = None
    predicted: PredictedWorth | None = None
    measured: MeasuredWorth | None = None
    answer: Answer
    sentence: str


class Advice(Artifact):
    """What protection is worth on a model under a recipe. `sinks`: the tokens that were found, as the sink map names
    them."""

    schema_: Literal["sinkquant/advice@1"] = Field(default="sinkquant/advice@1", alias="schema")
    model: str
    recipe: str
    sinks: list[str]
    mechanisms: list[MechanismAdvice]
    sentence: str
    evaluation: dict[str, str | int | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
