"""torch's int4 kernel of this machine's CPU: the order in which it keeps its codes, and back.

The kernel packs blocks of rows, column by column, two rows to a byte; which rows share a byte depends on the vectors of
the CPU (64 rows to a block with AVX-512, 32 with AVX2). The order is found by packing numbers that say where they came
from, so that a packed weight can be read again and one copy of it is all there is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkquant.errors import SinkquantError

STEP = 16
"""Rows are packed in multiples of this."""
PART = 4096
"""Rows that are packed at a time; whole blocks on every CPU."""


@dataclass(frozen=True)
class Int4CPU:
    """`block`: rows of a block. `places`: rows in a block -> int64 [rows], where each row lies in a column of it."""

    block: int
    places: dict[int, torch.Tensor]
    prefill: ClassVar[int] = 256
    """From so many tokens on, making the weight dense and multiplying is faster than the kernel."""

    @classmethod
    def probe(cls) -> Int4CPU:
        """Find the order on this machine.

        Raises:
            SinkquantError: torch keeps its codes in a way that is not understood here.
        """
        marked = torch.zeros(16 * STEP, 2, dtype=torch.int32)
        marked[:, 0] = 15
        first = _packed(marked).flatten()
        block = 2 * int((first == 0).nonzero()[0])
        layout = cls(block, {rows: _places(rows) for rows in range(STEP, block + 1, STEP)})
        codes = torch.randint(16, (2 * block + STEP, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        if not torch.equal(layout.unpack(layout.pack(codes), len(codes)), codes):
            raise SinkquantError("torch keeps int4 weights on this CPU in an order that is not understood; load "
                                 "without packed=True.")
        return layout

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, columns] of 0..15 -> uint8 [rows, columns / 2] as the kernel reads it."""
        return torch.cat([_packed(part.to(torch.int32)) for part in codes.split(PART)])

    def unpack(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """The inverse of `pack`, of any whole blocks at the beginning or the end of a weight.

        Args:
            words: uint8 [rows, columns / 2].

        Returns:
            uint8 [rows, columns].
        """
        columns = 2 * words.shape[1]
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        for start, stop, size in self._parts(rows):
            octets = words[start:stop].reshape(-1, columns, size // 2).mT  # [blocks, octets, columns]
            lanes = torch.stack((octets & 15, octets >> 4), 2).flatten(1, 2)
            codes[start:stop] = lanes[:, self.places[size]].flatten(0, 1)
        return codes

    def rows(self, words: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The codes of some rows of a whole weight.

        Args:
            words: uint8 [rows, columns / 2]. wanted: int64 [n], numbers of rows.

        Returns:
            uint8 [n, columns].
        """
        columns = 2 * words.shape[1]
        codes = torch.empty(len(wanted), columns, dtype=torch.uint8)
        for start, stop, size in self._parts(len(words)):
            here = (wanted >= start) & (wanted < stop)
            at = wanted[here] - start
            place = self.places[size][at % size]
            octets = words[start:stop].reshape(-1, columns, size // 2)[at // size, :, place // 2]
            codes[here] = octets >> (place % 2 * 4).to(torch.uint8)[:, None] & 15
        return codes

    def _parts(self, rows: int) -> list[tuple[int, int, int]]:
        """First row, row after the last and rows of a block: of the whole blocks, and of the smaller one at the end."""
        whole = rows // self.block * self.block
        return [part for part in ((0, whole, self.block), (whole, rows, rows - whole)) if part[1] > part[0]]

    def product(self, inputs: torch.Tensor, words: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        """inputs [tokens, columns] times the weight, [tokens, rows], both bfloat16; weights: (code - 8) * scale + zero.

        Args:
            scales: bfloat16 [columns / group, rows, 2], scale and zero.
        """
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, words, group, scales)
        return found


def _packed(codes: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed.reshape(len(codes), -1)


def _places(rows: int) -> torch.Tensor:
    """Where every row lies in a column of a block of so many rows."""
    row = torch.arange(rows, dtype=torch.int32)
    found = torch.zeros(rows, dtype=torch.int64)
    for digit, value in enumerate((row % 16, row // 16)):
        octets = _packed(value[:, None].repeat(1, 2)).flatten()[:rows // 2]
        found += torch.stack((octets & 15, octets >> 4), 1).flatten().to(torch.int64) * 16**digit
    return torch.argsort(found)
