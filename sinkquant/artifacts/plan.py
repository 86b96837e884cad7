"""Plan: what to do with every module, why, and what it will weigh."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict

Method = Literal["rtn", "gptq", "none"]


class ModuleDecision(Strict):
    """What happens to one linear.

    `bits` is 2..8, or 16 for a module that is left alone (`method` "none"). `group_size` is in input columns, -1 for
    one scale per output channel. `keep` says how its sink-related channels are kept: "module" for the whole linear
    at higher precision, null where nothing is kept. `columns` are those channels, `activations` the number format
    of the inputs (16 bits in this version).
    """

    bits: int
    group_size: int | None
    method: Method
    keep: Literal["module"] | None = None
    columns: list[int] = Field(default_factory=list)
    activations: str = "16-bit"
    bytes: int
    reason: str


class SinkSelector(Strict):
    """Which positions of a row hold a sink: a fixed position, a token id, or a token id at that position only."""

    token_id: int | None
    position: int | None


class Calibration(Strict):
    """The rows that the quantizer runs on, and what sink tokens weigh in its statistics.

    `text` is null for the packaged text; `sink_weight` multiplies a sink token's part of the Hessian, 1 is plain.
    """

    text: str | None
    rows: int
    length: int
    bos: Literal["auto", "always", "never"]
    batch_size: int
    sinks: list[SinkSelector]
    sink_weight: float
    damping: float
    act_order: bool


class Plan(Artifact):
    """Bits per module with reasons, exact bytes, and what loads the result.

    `bits_per_weight` averages over the linears of the blocks, scales and modules left in 16 bits counted.
    `weight_bytes` is the size of the checkpoint's safetensors files to the byte, their headers included.
    """

    SCHEMA: ClassVar[str] = "sinkquant/plan@1"

    schema_: Literal["sinkquant/plan@1"] = Field(default="sinkquant/plan@1", alias="schema")
    name: str
    bits_per_weight: float
    bits_per_parameter: float
    weight_bytes: int
    unquantized_bytes: int
    modules: dict[str, ModuleDecision]
    kv_cache: None = None
    calibration: Calibration
    seed: int
    predicted: dict[str, float]
    loads_in: list[str]
    notes: list[str] = Field(default_factory=list)
