"""Which of torch's kernels computes with a packed weight, or why none does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sinkquant.inference.int4_cpu import Int4CPU
from sinkquant.inference.int4_cuda import Int4CUDA
from sinkquant.schemes import WeightFormat, scheme_of

Int4 = Int4CPU | Int4CUDA
GROUPS = (256, 128, 64, 32)
"""Columns that the int4 kernel lets share a scale."""
ROWS = 16
"""The int4 kernel's rows come in multiples of this."""


@dataclass(frozen=True)
class Kernel:
    """`name` "int4": codes of 2 to 4 bits take 4 in memory, those of 5 to 8 bits two `planes` of 4, with a scale and a
    zero for every `group` columns. "int8": codes of 5 to 8 bits take 8, with one scale per row."""

    name: Literal["int4", "int8"]
    planes: int = 1
    group: int = -1

    def __str__(self) -> str:
        """In words."""
        return f"{self.name}{' x 2' if self.planes == 2 else ''}"


def kernel_for(form: WeightFormat, columns: int) -> Kernel | str:
    """The kernel for a linear of so many input columns, or in words why there is none."""
    if not scheme_of(form).integers:
        return f"torch has no kernel here for {form.numbers} weights"
    per_channel = form.group_size in (None, -1)
    size = columns if per_channel else int(form.group_size or columns)
    if size % GROUPS[-1]:
        what = f"its {columns} input columns are" if per_channel else f"its group size {size} is"
        return f"{what} no multiple of 32, which torch's kernels need"
    if form.bits > 4 and per_channel:
        return Kernel("int8")
    return Kernel("int4", 1 if form.bits <= 4 else 2, next(group for group in GROUPS if size % group == 0))


def int4_on(device: torch.device) -> Int4:
    """torch's int4 kernel for a device.

    Raises:
        RequestError: the device has none. SinkquantError: its order of codes is not understood.
    """
    return Int4CUDA.on(device) if device.type == "cuda" else Int4CPU.probe()
