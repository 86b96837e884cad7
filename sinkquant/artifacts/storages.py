"""The tensors that a linear becomes in the formats of other libraries: names after the module, dtype and shape."""

from __future__ import annotations

import json

from sinkquant.artifacts.formats import WeightFormat

Tensor = tuple[str, list[int]]
BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4-bit formats; scales that share one with double quantization."""
OFFSET_ROOM = 24
"""Characters of the longest float that JSON writes."""


def backend_tensors(rows: int, columns: int, form: WeightFormat, dtype: str) -> dict[str, Tensor]:
    """Leaf name -> (dtype, shape) of a packed linear of a backend other than compressed-tensors."""
    if form.storage.startswith(("nf4", "fp4")):
        return _bitsandbytes_4bit(rows, columns, form.storage, dtype)
    if form.storage == "llm.int8":
        return {"weight": ("int8", [rows, columns]), "SCB": ("float32", [rows]), "weight_format": ("uint8", [])}
    if form.storage == "gptq":
        return _gptq(rows, columns, form)
    return _quanto(rows, columns, form, dtype)


def quant_state(rows: int, columns: int, storage: str, dtype: str, offset: float = 0.0) -> bytes:
    """What bitsandbytes keeps as JSON beside a 4-bit weight, padded so that its length is known beforehand.

    Args:
        offset: the mean of the scales, which double quantization takes off them.
    """
    state: dict[str, object] = {"quant_type": storage[:3], "blocksize": BLOCK, "dtype": dtype, "shape": [rows, columns]}
    room = 0
    if storage.endswith("double"):
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        room = OFFSET_ROOM - len(json.dumps(offset))
    return json.dumps(state).encode() + b" " * room


def _bitsandbytes_4bit(rows: int, columns: int, storage: str, dtype: str) -> dict[str, Tensor]:
    scales = -(-rows * columns // BLOCK)
    state = f"weight.quant_state.bitsandbytes__{storage[:3]}"
    found = {"weight": ("uint8", [rows * columns // 2, 1]), "weight.quant_map": ("float32", [16]),
             state: ("uint8", [len(quant_state(rows, columns, storage, dtype))])}
    if not storage.endswith("double"):
        return found | {"weight.absmax": ("float32", [scales])}
    return found | {"weight.absmax": ("uint8", [scales]), "weight.nested_quant_map": ("float32", [256]),
                    "weight.nested_absmax": ("float32", [-(-scales // NESTED_BLOCK)])}


def _quanto(rows: int, columns: int, form: WeightFormat, dtype: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"input_scale": (dtype, []), "output_scale": (dtype, [])}
    if form.bits == 8:
        code = "float8_e4m3fn" if form.storage == "quanto-float8" else "int8"
        return found | {"weight._data": (code, [rows, columns]), "weight._scale": (dtype, [rows, 1])}
    size = columns if form.group_size in (None, -1) else int(form.group_size or columns)
    groups = rows * columns // size
    packed = -(-groups * form.bits // 8)  # codes of several rows share a byte
    return found | {"weight._data._data": ("uint8", [packed, size]), "weight._scale": (dtype, [groups, 1]),
                    "weight._shift": (dtype, [groups, 1])}


def _gptq(rows: int, columns: int, form: WeightFormat) -> dict[str, Tensor]:
    groups = 1 if form.group_size in (None, -1) else columns // int(form.group_size or columns)
    return {"qweight": ("int32", [columns * form.bits // 32, rows]),
            "qzeros": ("int32", [groups, rows * form.bits // 32]),
            "scales": ("float16", [groups, rows]), "g_idx": ("int32", [columns])}
