"""torch's int4 kernel for CUDA (tinygemm): the same codes, scales and zeros as on a CPU, in tiles of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkquant.errors import RequestError


@dataclass(frozen=True)
class Int4CUDA:
    """`block`: rows that can be read back by themselves: none but all."""

    device: torch.device
    block: ClassVar[int] = 1 << 62
    prefill: ClassVar[int | None] = None
    """Reading a weight back takes as long as multiplying with as many tokens as it has columns: never worth it."""

    @classmethod
    def on(cls, device: torch.device) -> Int4CUDA:
        """The kernel of a device.

        Raises:
            RequestError: torch sees no such device, or it is older than the kernel needs.
        """
        if not torch.cuda.is_available():
            raise RequestError(f"packed weights on {device} need a CUDA device, and torch sees none; use device='cpu'.")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise RequestError(f"torch's int4 kernel needs compute capability 8.0, and {device} has "
                               f"{capability[0]}.{capability[1]}; load without packed=True.")
        return cls(device)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, columns] of 0..15 -> int32 tiles [rows / 8, columns / (16 * tiles), 32, tiles / 2]."""
        codes = codes.to(self.device, torch.uint8)
        tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        octets = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(octets, tiles)
        return packed

    def unpack(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """The inverse of `pack`, uint8 [rows, columns]: the kernel multiplies every unit vector, which is exact."""
        columns = words.shape[1] * words.shape[3] * 32
        plain = torch.zeros(columns // 32, rows, 2, dtype=torch.bfloat16, device=words.device)
        plain[..., 0] = 1
        unit = torch.eye(columns, dtype=torch.bfloat16, device=words.device)
        return (self.product(unit, words, 32, plain).T + 8).to(torch.uint8)

    def product(self, inputs: torch.Tensor, words: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        """As `Int4CPU.product`."""
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm(inputs, words, group, scales)
        return found
