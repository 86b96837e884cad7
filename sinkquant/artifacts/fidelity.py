"""SinkFidelity: what quantization did to the sinks, each figure beside what the unquantized model does by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Strict


class FidelityCheck(Strict):
    """One figure of a quantized model against its original.

    `null`: what 95 % of comparisons of the original with itself on other text stay within (the same distance from
    `ideal`); `bound`: the larger of the null and a stated tolerance. `kept`: the figure is within the bound; null
    where the original has nothing that could be kept (`value` is null then).
    """

    name: str
    what: str
    value: float | None
    ideal: float
    null: float
    bound: float
    kept: bool | None


class SpreadCurve(Strict):
    """||delta h|| / ||h|| after the last block at every position when the token at `position` is swapped, mean over
    rows: of the original (`before`) and the quantized model (`after`)."""

    with_bos: bool
    position: int
    before: list[float]
    after: list[float]


class AttentionSample(Strict):
    """Attention on one short text. `before` and `after`: base64 of one byte per entry (255 is 1), [layers][heads] lower
    triangles row by row; one head stands for the mean of a layer where there are too many."""

    tokens: list[str]
    layers: int
    heads: int
    before: str
    after: str


class SinkFidelity(Strict):
    """All checks with a verdict.

    `heads` [layer][head]: divergence of sink mass in nats, see the check "head_divergence". `mass` and `mass_before`
    [layer][head]: mean attention on the sinks of the quantized model and of the original.
    `verdict` is "kept", "changed" (at least one check out of its bound), "destroyed" (most of the attention that went
    to the sinks goes elsewhere) or "no sinks" (the original has none).
    """

    verdict: Literal["kept", "changed", "destroyed", "no sinks"]
    sentence: str
    checks: list[FidelityCheck]
    heads: list[list[float]] = Field(default_factory=list)
    mass: list[list[float]] = Field(default_factory=list)
    mass_before: list[list[float]] = Field(default_factory=list)
    spread: list[SpreadCurve] = Field(default_factory=list)
    sample: AttentionSample | None = None
    rows: int = 0
    length: int = 0

    def check(self, name: str) -> FidelityCheck:
        """The check of that name; KeyError where there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)
