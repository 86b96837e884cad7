"""What is known of the toy format before a weight is read: the first example of docs/develop/add-a-format.md."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.schemes import Loads, Scheme, WeightFormat
from sinkquant.schemes.tensors import Tensor


@dataclass(frozen=True)
class Shifts(Scheme):
    """8-bit codes, and for every row the exponent of a power of two."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes and exponents."""
        return {"codes": ("int8", [rows, columns]), "exponents": ("int8", [rows])}


SHIFTS = Shifts(storage="shifts", backend="toy", words="shifted integers", format="shifts", bits=(8,), group_size=-1,
                methods=("rtn",), rounds_itself=True,
                loads=(Loads("sinkquant", "any", "", "tried", "tests/develop", caveat="with the package toy"),))
