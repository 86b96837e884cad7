"""WeightFormat: how the weights of one linear are stored, which decides its bytes and who can load it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """`bits` 2..8, or 16 for a linear that is left as it is; `group_size` in input columns, -1 for one scale per
    output channel, null with 16 bits."""

    bits: int
    group_size: int | None

    @property
    def packed(self) -> bool:
        """Whether codes and scales are stored instead of the weight."""
        return self.bits < 16
