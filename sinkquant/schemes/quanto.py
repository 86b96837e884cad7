"""quanto: affine 2 and 4 bits in groups of its own choice, symmetric int8 and float8 by row."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

BACKEND = "quanto"
_LOADS = (Loads("optimum.quanto", "any", "0.2.7", "tried", "tests/schemes/codecs"),
          Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/codecs"))
_NOTES = ("optimum.quanto loads it (QuantizedModelForCausalLM), plain transformers refuses it",)


@dataclass(frozen=True)
class Quanto(Scheme):
    """Codes and scales in the model's own dtype."""

    floating: bool = False

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes, scales and what is taken off; and the scales of inputs and outputs, which are one."""
        found: dict[str, Tensor] = {"input_scale": (dtype, []), "output_scale": (dtype, [])}
        if form.bits == 8:
            code = "float8_e4m3fn" if self.floating else "int8"
            return found | {"weight._data": (code, [rows, columns]), "weight._scale": (dtype, [rows, 1])}
        groups = rows * form.groups(columns)
        packed = -(-groups * form.bits // 8)  # codes of several rows share a byte
        return found | {"weight._data._data": ("uint8", [packed, rows * columns // groups]),
                        "weight._scale": (dtype, [groups, 1]), "weight._shift": (dtype, [groups, 1])}

    def group_for(self, bits: int) -> int | None:
        """8 bits have a scale per row."""
        return -1 if bits == 8 else self.group_size

    def fitted(self, bits: int, group_size: int | None, columns: int) -> int | None:
        """The group that quanto picks: 128, or the largest of 96, 64 and 32 that divides; rows of 128 or less are
        one."""
        if bits == 8 or columns <= 128:
            return -1
        return next((size for size in (128, 96, 64, 32) if columns % size == 0), -1)


INTEGERS = Quanto(
    storage="quanto", backend=BACKEND, words="quanto's integer weights", bits=(2, 4, 8), mixed=True, group_size=128,
    methods=("rtn",), rounds_itself=True, zero_from=8, packages=(("optimum-quanto", "optimum.quanto"),), loads=_LOADS,
    notes=_NOTES)
FLOAT8 = Quanto(
    storage="quanto-float8", backend=BACKEND, words="quanto's float8 weights", format="float8", bits=(8,),
    group_size=-1, methods=("rtn",), rounds_itself=True, packages=(("optimum-quanto", "optimum.quanto"),),
    loads=_LOADS, notes=_NOTES, floating=True)
