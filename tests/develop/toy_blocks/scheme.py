"""Four-bit floats in blocks of 16, as NVFP4 has them: what the contract of a scheme has to be wide enough for."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.schemes import Loads, Scheme, WeightFormat
from sinkquant.schemes.tensors import Tensor

BLOCK = 16


@dataclass(frozen=True)
class Blocks(Scheme):
    """Two codes to a byte, an FP8 scale for every block, and one float32 scale of the tensor."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        return {"weight_packed": ("uint8", [rows, columns // 2]),
                "weight_scale": (self.scales(dtype, expert), [rows, columns // BLOCK]),
                "weight_global_scale": ("float32", [1])}

    def scales(self, dtype: str, expert: bool) -> str:
        return "float8_e4m3fn"

    def obstacle(self, rows: int, columns: int, own_parameter: bool) -> str:
        if columns % BLOCK:
            return f"blocks hold {BLOCK} columns, and the weight has {columns}"
        return super().obstacle(rows, columns, own_parameter)


BLOCKS = Blocks(storage="blocks", backend="toy-blocks", words="floats in blocks", kind="float", format="blocks",
                bits=(4,), group_size=BLOCK, mixed=True, methods=("rtn",), fused_scale=True,
                loads=(Loads("sinkquant", "any", "", "tried", "tests/develop"),))
