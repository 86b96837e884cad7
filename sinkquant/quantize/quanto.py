"""quanto's number formats: affine 2 and 4 bits in groups of its own choice, symmetric int8 and float8 per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Leaves = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quanto:
    """Round to nearest with quanto's own optimizers: the range of a group at 2 and 4 bits, the largest weight of a row
    at 8.

    `group_size`: in input columns, -1 for one group per row.
    """

    bits: int
    group_size: int
    floating: bool = False

    def encode(self, weight: torch.Tensor) -> Leaves:
        """weight: float [rows, columns]. Returns leaf name -> tensor, as quanto saves them."""
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer
        from optimum.quanto.tensor import qfloat8, qint2, qint4, qint8, quantize_weight

        kind = qfloat8 if self.floating else {2: qint2, 4: qint4, 8: qint8}[self.bits]
        group = None if self.group_size == -1 else self.group_size
        if self.bits == 8:
            scale, shift = AbsmaxOptimizer()(weight, qtype=kind, axis=0), None
        else:
            scale, shift = MaxOptimizer()(weight, qtype=kind, axis=0, group_size=group)
        made = quantize_weight(weight, kind, 0, scale, shift, group, optimized=False)
        leaves: Leaves = {}
        made.save_to_state_dict(leaves, "weight.", False)
        one = torch.ones((), dtype=weight.dtype)
        return {name: leaf.contiguous() for name, leaf in leaves.items()} | {
            "input_scale": one, "output_scale": one.clone()}

    def decode(self, leaves: Leaves, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, [rows, columns] in `dtype`: scale * code - shift."""
        scale = leaves["weight._scale"].to(dtype)
        if self.bits == 8:
            return (scale * leaves["weight._data"].to(dtype)).reshape(shape)
        # quanto unpacks with an extension that it compiles on first use: a minute, and a compiler, for two shifts.
        packed = leaves["weight._data._data"]
        codes = torch.cat([packed >> used & 2 ** self.bits - 1 for used in range(0, 8, self.bits)])[:len(scale)]
        return (scale * codes - leaves["weight._shift"].to(dtype)).reshape(shape)
