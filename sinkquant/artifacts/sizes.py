"""How many bytes a checkpoint of a model will have, to the byte, from shapes alone."""

from __future__ import annotations

from sinkquant.artifacts.shapes import ModelShape
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.tensors import DTYPES, Tensor, total_bytes

GUARD: Tensor = ("int8", [0])
"""Stands under the name of the first packed weight of a checkpoint in sinkquant's own format. A transformers that does
not know the format would only warn and run a random model; a weight of the wrong shape it refuses to load."""


def packed_tensors(name: str, rows: int, columns: int, form: WeightFormat, dtype: str,
                   expert: bool = False) -> dict[str, Tensor]:
    """The tensors that a quantized linear becomes, by their names in a checkpoint. `dtype`: of the model."""
    leaves = scheme_of(form).tensors(rows, columns, form, dtype, expert)
    return {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}


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
    return total_bytes(packed.values())


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
    return tensors | shape.carried


def checkpoint_bytes(shape: ModelShape, formats: dict[str, WeightFormat]) -> int:
    """Bytes of the files with the weights of a checkpoint, their headers included. `formats` as in
    `checkpoint_tensors`."""
    scheme = scheme_of(next(iter(formats.values()), WeightFormat(16, None)))
    return scheme.file_size(checkpoint_tensors(shape, formats), shape.carried, shape.architecture, shape.folder)
