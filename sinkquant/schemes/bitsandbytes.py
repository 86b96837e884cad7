"""bitsandbytes: NF4 and FP4 in blocks of 64 weights, with scales that may be quantized too, and LLM.int8()."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

BACKEND = "bitsandbytes"
BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4-bit formats; scales that share one with double quantization."""
OFFSET_ROOM = 24
"""Characters of the longest float that JSON writes."""
_LOADS = (Loads("transformers with bitsandbytes", "any", "0.49", "tried", "tests/schemes/codecs"),
          Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/codecs"))


@dataclass(frozen=True)
class FourBit(Scheme):
    """Sixteen levels, `quant_type` "nf4" or "fp4"; two codes to a byte."""

    quant_type: str = ""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes, the levels, the scales of all blocks, and a description in JSON."""
        scales = -(-rows * columns // BLOCK)
        found: dict[str, Tensor] = {
            "weight": ("uint8", [rows * columns // 2, 1]), "weight.quant_map": ("float32", [16]),
            self.state_name: ("uint8", [len(self.quant_state(rows, columns, dtype))])}
        if not self.double_quantization:
            return found | {"weight.absmax": ("float32", [scales])}
        return found | {"weight.absmax": ("uint8", [scales]), "weight.nested_quant_map": ("float32", [256]),
                        "weight.nested_absmax": ("float32", [-(-scales // NESTED_BLOCK)])}

    @property
    def state_name(self) -> str:
        """What the description is called, after the module's name."""
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"

    def quant_state(self, rows: int, columns: int, dtype: str, offset: float = 0.0) -> bytes:
        """The description, padded so that its length is known beforehand.

        Args:
            offset: the mean of the scales, which double quantization takes off them.
        """
        state: dict[str, object] = {"quant_type": self.quant_type, "blocksize": BLOCK, "dtype": dtype,
                                    "shape": [rows, columns]}
        room = 0
        if self.double_quantization:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            room = OFFSET_ROOM - len(json.dumps(offset))
        return json.dumps(state).encode() + b" " * room

    def obstacle(self, rows: int, columns: int, own_parameter: bool) -> str:
        """bitsandbytes lets blocks run from one row into the next, and unpacks them by row."""
        if columns % BLOCK and own_parameter:
            return f"bitsandbytes gives wrong values where {BLOCK} does not divide the {columns} input columns"
        return super().obstacle(rows, columns, own_parameter)


@dataclass(frozen=True)
class RowsOfInt8(Scheme):
    """LLM.int8(): every row is scaled by its largest weight."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes, the scale of every row, and the order that the codes are in."""
        return {"weight": ("int8", [rows, columns]), "SCB": ("float32", [rows]), "weight_format": ("uint8", [])}


def _four_bit(quant_type: str, double: bool) -> FourBit:
    return FourBit(
        storage=f"{quant_type}-double" if double else quant_type, backend=BACKEND,
        words=f"{quant_type.upper()} weights", format=quant_type, double_quantization=double, bits=(4,),
        group_size=BLOCK, methods=("rtn",), rounds_itself=True, packages=((BACKEND, BACKEND),), loads=_LOADS,
        quant_type=quant_type)


NF4, FP4 = _four_bit("nf4", double=False), _four_bit("fp4", double=False)
FOUR_BIT = (NF4, _four_bit("nf4", double=True), FP4, _four_bit("fp4", double=True))
LLM_INT8 = RowsOfInt8(
    storage="llm.int8", backend=BACKEND, words="LLM.int8() weights", bits=(8,), group_size=-1, methods=("rtn",),
    rounds_itself=True, own_module=True, packages=((BACKEND, BACKEND),), loads=_LOADS,
    notes=("LLM.int8() rounds the inputs of its linears too, columns over 6 excepted",))
