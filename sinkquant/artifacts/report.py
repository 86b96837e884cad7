"""Report: what quantization cost, beside the unquantized model and the control of the same size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.fidelity import SinkFidelity


class Measure(Strict):
    """A metric's value and its standard error (null where the harness gives none)."""

    value: float
    stderr: float | None = None


class PositionLoss(Strict):
    """Mean KL of the positions `first` to `last` of a row, the first position being 0."""

    first: int
    last: int
    kl: float


class Row(Strict):
    """One evaluated model. `kv_bits` is 16 where the cache is not quantized, else bits per key and value with scales,
    window and exact tokens counted; `kv_bytes` is what the cache of one row weighs at the plan's length.
    `activations` says what inputs of linears are rounded to. `kl_by_position`: where in a row the divergence is.
    `kl_generating`: the same over a continuation that went through the KV cache token by token, by distance from the
    prompt; for the unquantized model through a cache in bfloat16. Empty where it was not asked for."""

    name: str
    path: str
    weight_bytes: int
    bits_per_weight: float
    kv_bits: float = 16.0
    kv_bytes: int | None = None
    activations: str = "16-bit"
    tasks: dict[str, dict[str, Measure]]
    kl_by_position: list[PositionLoss] = Field(default_factory=list)
    kl_generating: list[PositionLoss] = Field(default_factory=list)


class Paired(Strict):
    """A difference a - b of two rows on the same `documents` (rows of tokens for "divergence"), with its 95 %
    interval: by the bootstrap over documents, for "divergence" that of the stopping rule
    (docs/guides/evaluation.md)."""

    task: str
    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    higher_is_better: bool = False
    documents: int = 0


class Fidelity(Strict):
    """What quantization did to the sinks: sink rates and the largest massive activation, per row; and every quantized
    row compared with the unquantized one, check by check."""

    sink_rate: dict[str, dict[str, float]]
    massive_peak: dict[str, float]
    massive_ratio: dict[str, float]
    comparisons: dict[str, SinkFidelity] = Field(default_factory=dict)


class Verdict(Strict):
    """Does protection pay? `answer` is "pays", "does not pay" or "no difference shown"; `sentence` says by how much,
    `details` with the interval, and for each mechanism on its own.

    `gate` is null where the recipe has no quality gate; `failures` says which of its bounds were broken."""

    answer: Literal["pays", "does not pay", "no difference shown", "not measured"]
    sentence: str
    details: list[str] = Field(default_factory=list)
    gate: Literal["passed", "failed"] | None = None
    failures: list[str] = Field(default_factory=list)


class Forecast(Strict):
    """A figure that was predicted before the work, beside what was measured after it.

    `row`: the plan that it is of, or "run". `quantity` "kl": KL divergence from the unquantized model in nats per
    token, by the formats of the weights, "kl_kv": by those of the KV cache; "weight_bytes"; or a name with its unit.
    Null: not predicted, or not measured; `note` says why, or what else is in the measured figure.
    """

    row: str
    quantity: str
    predicted: float | None
    measured: float | None
    note: str = ""


class Report(Artifact):
    """What it cost. `recovery` is quantized / unquantized by row, task and metric, 1.0 is lossless; for metrics
    where lower is better it is unquantized / quantized. `plots` maps a plot's name to its alternative text, `notes` say
    where the run could not do what the recipe asked for (a shorter context, less text). `forecasts`: what was predicted
    beside what came of it."""

    schema_: Literal["sinkquant/report@1"] = Field(default="sinkquant/report@1", alias="schema")
    model: str
    recipe: str
    rows: list[Row]
    paired: list[Paired]
    recovery: dict[str, dict[str, dict[str, float]]]
    fidelity: Fidelity | None
    verdict: Verdict
    forecasts: list[Forecast] = Field(default_factory=list)
    plots: dict[str, str] = Field(default_factory=dict)
    evaluation: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    resources: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def row(self, name: str) -> Row:
        """The row of that name; KeyError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)
