"""Who loads a number format, on which hardware, and where that is known from: the rows of the engine table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkquant.schemes.weight_format import WeightFormat


@dataclass(frozen=True)
class Loads:
    """One engine that loads a scheme, for the formats of it that meet all conditions; null: any will do.

    Attributes:
        engine: as `plan.json` names it. hardware, since: where it runs, and from which version on.
        known: "tried" here, or "read" in `place`.
        bits, group_sizes, inputs: what weights and inputs may be. caveat: what to know of it.
    """

    engine: str
    hardware: str
    since: str
    known: Literal["tried", "read"]
    place: str
    bits: frozenset[int] | None = None
    group_sizes: frozenset[int] | None = None
    inputs: frozenset[str] | None = None
    caveat: str = ""

    def takes(self, form: WeightFormat) -> bool:
        """Whether a format meets the conditions."""
        return (self.bits is None or form.bits in self.bits) and (
            self.group_sizes is None or form.group_size in self.group_sizes) and (
            self.inputs is None or form.inputs in self.inputs)
