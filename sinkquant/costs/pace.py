"""Seconds that pieces of work take on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.costs.sizes import Sizes

READ_BYTES = 1e9
"""Bytes per second that files are read and written at."""
VALUE_PASSES = 2.0
"""Passes over all logits, as costly as a log-softmax, that lm-eval and the divergence make."""


@dataclass(frozen=True)
class Rate:
    """Seconds that a set of rows takes in one block: `fixed`, however few there are, and for one `token`."""

    fixed: float
    token: float

    def of(self, tokens: float) -> float:
        """Seconds for a set of so many tokens."""
        return self.fixed + tokens * self.token


@dataclass(frozen=True)
class Pace:
    """Seconds that things take here.

    Attributes:
        operation: one floating-point operation of a large product. value: one value of a log-softmax. scored: one value
            of the cross-entropy of whole rows.
        watched: a set of rows in one block, watched as detection watches its short rows, and its long ones, whose
            inputs it records.
        plain: one token in one block of a plain forward pass.
        column: one column of a matrix that GPTQ solves. column_row: one row in one such column.
        rounded: rounding one weight. kept: packing, checking and comparing one that was quantized.
    """

    operation: float
    value: float
    scored: float
    watched: tuple[Rate, Rate]
    plain: float
    column: float
    column_row: float
    rounded: float
    kept: float

    def reading(self, sizes: Sizes) -> float:
        """Seconds to read the weights of all blocks once, or to write them."""
        return sizes.weights * sizes.stored / READ_BYTES

    def head(self, sizes: Sizes) -> float:
        """Seconds that one token takes through the head, with the passes over what it gives."""
        return sizes.vocabulary * (2 * sizes.hidden * self.operation + VALUE_PASSES * self.value)

    def loss(self, sizes: Sizes) -> float:
        """Seconds that one token of whole rows takes through the head and the cross-entropy."""
        return sizes.vocabulary * (2 * sizes.hidden * self.operation + self.scored)
