"""The tensors of a checkpoint, read one at a time and never mapped into memory. Weights that sinkquant packed look like
the dense weights that they stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from sinkquant.models.folder import weight_files
from sinkquant.models.gguf_index import is_gguf_checkpoint
from sinkquant.models.gguf_tensors import gguf_tensors
from sinkquant.models.headers import read_header
from sinkquant.models.stored import StoredTensor

PARTS = ("weight_packed", "weight_scale", "weight_columns", "weight_exact", "weight_places", "weight_values")
"""What a packed linear's weight is read from."""
BLOCK_PARTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale")
"""The same in blocks of floating-point numbers."""


class Stored(Protocol):
    """A tensor on disk. `stored[...]` reads it, as transformers' loader expects of a safetensors slice."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""

    def __getitem__(self, _: Any) -> torch.Tensor:
        """Read all of it."""


@dataclass(frozen=True)
class PackedTensor:
    """The dense weight that packed int32 words and scales stand for, with what stands beside them, in `dtype`:
    [rows, columns], or the other way round where the model stores it `transposed`."""

    parts: Mapping[str, StoredTensor]
    bits: int
    size: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        return self.size[::-1] if self.transposed else self.size

    def __getitem__(self, _: Any) -> torch.Tensor:
        parts = {leaf: tensor[...] for leaf, tensor in self.parts.items()}
        codes = unpack_from_int32(parts["weight_packed"], self.bits, torch.Size(self.size))
        scale = parts["weight_scale"].float()
        dense = (codes.float().reshape(*scale.shape, -1) * scale[..., None]).reshape(self.size)
        if "weight_columns" in parts:
            dense[:, parts["weight_columns"].long()] += parts["weight_exact"].float()
        if "weight_places" in parts:
            row, column = parts["weight_places"].long().unbind(1)
            dense[row, column] += parts["weight_values"].float()
        dense = dense.to(self.dtype)
        return dense.T.contiguous() if self.transposed else dense


@dataclass(frozen=True)
class ScaledTensor:
    """The dense weight that codes of a byte each and scales stand for, [rows, columns] in `dtype`; some rows of it can
    be read by themselves."""

    codes: StoredTensor
    scale: StoredTensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        return self.codes.shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._dense(self.codes[...], self.scale[...])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows start..stop."""
        return self._dense(self.codes.rows(start, stop), self.scale.rows(start, stop))

    def pick(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows. ids: int64, ascending."""
        return self._dense(self.codes.pick(ids), self.scale.pick(ids))

    def _dense(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        dense = codes.float().reshape(*scale.shape, -1) * scale.float()[..., None]
        return dense.reshape(codes.shape).to(self.dtype)


@dataclass(frozen=True)
class BlockTensor:
    """The dense weight that floating-point codes in blocks stand for, [rows, columns] in `dtype`, as compressed-tensors
    unpacks it. parts: its tensors by what follows the module's name. preset: its name of the format."""

    parts: Mapping[str, StoredTensor]
    preset: str
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is read."""
        packed = self.parts.get("weight_packed")
        return self.parts["weight"].shape if packed is None else (packed.shape[0], 2 * packed.shape[1])

    def __getitem__(self, _: Any) -> torch.Tensor:
        scheme = preset_name_to_scheme(self.preset, ["Linear"])
        unpacker = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
        stored = {leaf: part[...] for leaf, part in self.parts.items()}
        dense: torch.Tensor = unpacker.decompress(stored, scheme)["weight"]
        return dense.to(self.dtype)


def _preset(parts: Mapping[str, StoredTensor]) -> str | None:
    """What compressed-tensors calls the format of a weight in blocks; None for any other. parts: as `BlockTensor`."""
    if "weight_global_scale" in parts:
        return "NVFP4A16"
    if parts["weight_scale"].dtype == torch.uint8:
        return "MXFP4A16" if "weight_packed" in parts else "MXFP8A16"
    return None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by the name that it has on disk.

    Raises:
        RequestError: a file of the checkpoint is missing or broken.
    """
    if is_gguf_checkpoint(folder):
        return gguf_tensors(folder)
    return {name: StoredTensor(path, entry.offset, getattr(torch, entry.dtype), entry.shape)
            for path in weight_files(folder) for name, entry in read_header(path).items()}


def dense_tensors(tensors: Mapping[str, StoredTensor], bits: Mapping[str, int], dtype: torch.dtype,
                  transposed: Collection[str] = ()) -> dict[str, Stored]:
    """Replace the tensors of every quantized linear by the dense weight that they stand for.

    Args:
        bits: module name -> bits of every quantized linear. dtype: of the dense weights. transposed: modules that store
            their weight as [columns, rows].
    """
    dense: dict[str, Stored] = {
        name: tensor for name, tensor in tensors.items()
        if not (name.rpartition(".")[0] in bits and name.rpartition(".")[2].startswith(("weight", "input_")))}
    for name, width in bits.items():
        if not {f"{name}.weight", f"{name}.weight_packed"} & tensors.keys():
            continue  # a tied head has scales under its own name, and the embedding's codes
        blocks = {leaf: tensors[f"{name}.{leaf}"] for leaf in BLOCK_PARTS if f"{name}.{leaf}" in tensors}
        if preset := _preset(blocks):
            dense[f"{name}.weight"] = BlockTensor(blocks, preset, dtype)
            continue
        if f"{name}.weight_packed" not in tensors:
            dense[f"{name}.weight"] = ScaledTensor(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], dtype)
            continue
        rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"][...])
        parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in PARTS if f"{name}.{leaf}" in tensors}
        dense[f"{name}.weight"] = PackedTensor(parts, width, (rows, columns), dtype, name in transposed)
    return dense
