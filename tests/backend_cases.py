"""What every backend is asked for in the tests: recipe keys by a short name."""

from __future__ import annotations

_BITSANDBYTES = ("backend=bitsandbytes", "weights.method=rtn")
_QUANTO = ("backend=quanto", "weights.method=rtn", "weights.group_size=128")
BACKEND_CASES: dict[str, tuple[str, ...]] = {
    "nf4": (*_BITSANDBYTES, "weights.format=nf4", "weights.group_size=64"),
    "nf4-double": (*_BITSANDBYTES, "weights.format=nf4", "weights.group_size=64", "weights.double_quantization=true"),
    "fp4": (*_BITSANDBYTES, "weights.format=fp4", "weights.group_size=64"),
    "fp4-double": (*_BITSANDBYTES, "weights.format=fp4", "weights.group_size=64", "weights.double_quantization=true"),
    "llm.int8": (*_BITSANDBYTES, "weights.bits=8", "weights.group_size=-1"),
    "quanto-2": (*_QUANTO, "weights.bits=2"),
    "quanto-4": (*_QUANTO, "weights.bits=4"),
    "quanto-8": (*_QUANTO, "weights.bits=8", "weights.group_size=-1"),
    "quanto-float8": (*_QUANTO, "weights.bits=8", "weights.format=float8", "weights.group_size=-1"),
    "gptq-4": ("backend=gptq", "weights.group_size=32"),
    "gptq-3": ("backend=gptq", "weights.bits=3", "weights.group_size=64", "weights.method=rtn")}
"""Ready to be set on top of a recipe; hidden and inner widths of multiples of 64 are needed."""
