"""How many bytes a checkpoint will have, to the byte, from shapes alone."""

from __future__ import annotations

import json
import math

from sinkquant.artifacts.formats import PLAIN, WeightFormat
from sinkquant.artifacts.shapes import ModelShape
from sinkquant.artifacts.storages import backend_tensors

DTYPES = {"int64": ("I64", 8), "float64": ("F64", 8), "float32": ("F32", 4), "int32": ("I32", 4),
          "bfloat16": ("BF16", 2), "float16": ("F16", 2), "int16": ("I16", 2), "float8_e4m3fn": ("F8_E4M3", 1),
          "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1)}
"""torch's name of a dtype -> its name in safetensors and its bytes, in the order in which safetensors writes them."""

FILE_BYTES = 5 * 10**9
"""A checkpoint with more bytes of tensors is written as several files."""

Tensor = tuple[str, list[int]]
"""dtype and shape."""

GUARD: Tensor = ("int8", [0])
"""Stands under the name of the first packed weight of a checkpoint in sinkquant's own format. A transformers that does
not know the format would only warn and run a random model; a weight of the wrong shape it refuses to load."""


def scale_dtype(dtype: str) -> str:
    """Scales take 16 bits: float16 in a float16 model, bfloat16 in any other."""
    return "float16" if dtype == "float16" else "bfloat16"


def expert_scale_dtype(dtype: str) -> str:
    """Scales of experts have the model's own dtype: transformers makes the experts that it unpacks as wide as their
    scales, and does not cast them to the dtype of the rest."""
    return "float32" if dtype == "float32" else scale_dtype(dtype)


def packed_tensors(name: str, rows: int, columns: int, form: WeightFormat, dtype: str,
                   expert: bool = False) -> dict[str, Tensor]:
    """The tensors that a quantized linear becomes: dense int32 words, scales, and its shape; or codes of a byte each
    and scales; or what another backend makes of it. One scale more where its inputs have a static one; and the columns
    and single weights that stand beside the codes, where there are any."""
    if form.storage != PLAIN:
        leaves = backend_tensors(rows, columns, form, dtype)
        return {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    groups = 1 if form.group_size in (None, -1) else columns // int(form.group_size or 1)
    scales = expert_scale_dtype(dtype) if expert else scale_dtype(dtype)
    scale = {f"{name}.weight_scale": (scales, [rows, groups])}
    inputs = {f"{name}.input_scale": (scale_dtype(dtype), [1])} if form.static_inputs else {}
    if form.layout != "pack-quantized":
        codes = "float8_e4m3fn" if form.kind == "float" else "int8"
        return {f"{name}.weight": (codes, [rows, columns])} | scale | inputs
    beside: dict[str, Tensor] = {}
    if form.columns:
        beside |= {f"{name}.weight_columns": ("int32", [form.columns]),
                   f"{name}.weight_exact": (scale_dtype(dtype), [rows, form.columns])}
    if form.scalars:
        beside |= {f"{name}.weight_places": ("int32", [form.scalars, 2]),
                   f"{name}.weight_values": (scale_dtype(dtype), [form.scalars])}
    return {f"{name}.weight_packed": ("int32", [rows, math.ceil(columns * form.bits / 32)])} | scale | {
        f"{name}.weight_shape": ("int64", [2])} | inputs | beside


def own_format(shape: ModelShape, formats: dict[str, WeightFormat]) -> bool:
    """Whether a checkpoint has to be in sinkquant's own format: a weight is split, or stored transposed.

    Args:
        formats: module name -> format of every packed linear.
    """
    return any(form.split or shape.linears[name].transposed for name, form in formats.items())


def module_bytes(shape: ModelShape, name: str, form: WeightFormat) -> int:
    """Bytes of one linear without its bias: codes, 16-bit scales and shape, or the weight as it stands in the
    unquantized checkpoint where it is left alone."""
    linear = shape.linears[name]
    if not form.packed:
        stored = linear.part_of or f"{name}.weight"
        dtype, _ = shape.tensors.get(stored) or shape.tensors.get(name) or (shape.dtype, [])
        return DTYPES[dtype][1] * linear.parameters
    packed = packed_tensors(name, linear.rows, linear.columns, form, shape.dtype, linear.part_of is not None)
    return sum(tensor_bytes(*tensor) for tensor in packed.values())


def checkpoint_tensors(shape: ModelShape, formats: dict[str, WeightFormat]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, name -> (dtype, shape), in the order of the model.

    Args:
        formats: module name -> format of every packed linear; the rest stays as it is. Parts of a fused parameter
            come one by one where they are packed.
    """
    parts: dict[str, list[str]] = {}
    for name, linear in shape.linears.items():
        if linear.part_of and name in formats:
            parts.setdefault(linear.part_of, []).append(name)
    tensors: dict[str, Tensor] = {}
    guarded = own_format(shape, formats)
    for name, tensor in shape.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in formats:
            linear = shape.linears[module]
            tensors |= packed_tensors(module, linear.rows, linear.columns, formats[module], shape.dtype)
            if guarded:
                tensors[name] = GUARD
                guarded = False
        elif name in parts:
            for part in parts[name]:
                linear = shape.linears[part]
                tensors |= packed_tensors(part, linear.rows, linear.columns, formats[part], shape.dtype, expert=True)
        else:
            tensors[name] = tensor
    return tensors


def checkpoint_files(tensors: dict[str, Tensor], limit: int = FILE_BYTES) -> list[dict[str, Tensor]]:
    """Which tensors go into which safetensors file: in order, a new one where `limit` bytes would be passed."""
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(*tensor)
        if files[-1] and filled + size > limit:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += size
    return files


def checkpoint_bytes(shape: ModelShape, formats: dict[str, WeightFormat]) -> int:
    """Bytes of the safetensors files of a checkpoint, their headers included. `formats` as in `checkpoint_tensors`."""
    files = checkpoint_files(checkpoint_tensors(shape, formats))
    return sum(len(file_header(file)) + sum(tensor_bytes(*tensor) for tensor in file.values()) for file in files)


def tensor_bytes(dtype: str, size: list[int]) -> int:
    """Bytes of one tensor."""
    return DTYPES[dtype][1] * math.prod(size)


def file_header(tensors: dict[str, Tensor]) -> bytes:
    """What stands before the data of a safetensors file: the length of its JSON, and the JSON with the place of every
    tensor. safetensors writes tensors by dtype, then by name, and pads the JSON to eight bytes."""
    rank = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (rank.index(item[1][0]), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, size) in ordered:
        end = offset + tensor_bytes(dtype, size)
        header[name] = {"dtype": DTYPES[dtype][0], "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
