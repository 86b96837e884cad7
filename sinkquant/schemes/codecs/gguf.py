"""Codes of ggml's blocks, and checkpoints that are one GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models.gguf_index import FILE
from sinkquant.models.gguf_tensors import in_models_order
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.files import LibraryFiles, kept_linears
from sinkquant.schemes.codecs.gguf_writer import write_file
from sinkquant.schemes.codecs.grid import Grid
from sinkquant.schemes.codecs.packed import PackedWeight
from sinkquant.schemes.codecs.table_grid import IQ4_NL, TableGrid
from sinkquant.schemes.codecs.zeros import ZeroGrid, ZeroWeight
from sinkquant.schemes.gguf import BACKEND
from sinkquant.schemes.gguf.names import CODES
from sinkquant.schemes.gguf.scheme import BLOCK, GGUF, Blocks, holding

HALF = BLOCK // 2
DIGITS = 11
"""Significant bits of float16, which a scale times a zero point has to fit into."""
MOST_DIGITS = 7


@dataclass(frozen=True)
class GGMLCodec(Codec):
    """Whole numbers around zero, stored with half their range added; from a zero point on, which is stored as the least
    value of a block; or those of IQ4_NL's table, stored by their place."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """The kind of block, uint8 [rows, bytes of a row]."""
        assert isinstance(weight, PackedWeight)
        if isinstance(weight, ZeroWeight):
            codes, scale, zero = weight.stored()
            numbers = [scale, (-scale.float() * zero).to(torch.float16)]  # exact: see zeros.py
        else:
            codes, numbers = weight.codes, [weight.scale.to(torch.float16)]
            if self._curved(form):
                codes = torch.bucketize(codes, _numbers(codes)).to(torch.uint8)
            elif form.bits == 8:
                codes = codes.contiguous().view(torch.uint8)
            else:
                codes = (codes + 2 ** (form.bits - 1)).to(torch.uint8)
        return {self._kind(form): to_blocks(codes, form.bits, numbers)}

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> Grid:
        """Whole numbers, from a zero point of the group on where the kind has them, or those of a table."""
        size = form.group_size or -1
        if self._zeros(form):
            return ZeroGrid(form.bits, size, digits=min(MOST_DIGITS, DIGITS - form.bits))
        return TableGrid(IQ4_NL, size) if self._curved(form) else super().grid(form, scale_dtype)

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """number * scale, and the least value added where there is one, [rows, columns] in `dtype`."""
        rows, columns = shape
        stored = leaves[self._kind(form)].reshape(rows, columns // BLOCK, -1)
        zeros = self._zeros(form)
        codes, numbers = from_blocks(stored, form.bits, 1 + zeros)
        scale = numbers[0].float()
        if form.bits == 8:
            dense = codes.contiguous().view(torch.int8).float() * scale
        elif self._curved(form):
            dense = _numbers(codes)[codes.long()].float() * scale
        else:
            dense = codes.float() * scale + (numbers[1].float() if zeros else -(2 ** (form.bits - 1)) * scale)
        return dense.reshape(rows, columns).to(dtype)

    def _zeros(self, form: WeightFormat) -> bool:
        return self._kind(form).endswith("_1")

    def _curved(self, form: WeightFormat) -> bool:
        return self._kind(form) == "iq4_nl"

    def _kind(self, form: WeightFormat) -> str:
        assert isinstance(self.scheme, Blocks)
        return self.scheme.kind_of(form.bits)


def _numbers(beside: torch.Tensor) -> torch.Tensor:
    """Those of IQ4_NL, int8, where another tensor is."""
    return torch.tensor(IQ4_NL, dtype=torch.int8, device=beside.device)


class GGUFFiles(LibraryFiles):
    """One file that llama.cpp runs; beside it what every checkpoint has."""

    backend = BACKEND

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """What says that the weights are in the file."""
        storage = next(iter(plan.formats.values())).storage
        return {"quant_method": BACKEND, "file": FILE, "storage": storage,
                "modules_to_not_convert": kept_linears(model, plan)}

    def finish(self, folder: Path, plan: Plan, architecture: str, written: Callable[[], None]) -> None:
        """Make the one file of the safetensors files, which go."""
        scheme = scheme_of(next(iter(plan.formats.values())))
        assert isinstance(scheme, Blocks)
        write_file(folder, scheme, architecture, written)

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """By the kinds of the file's tensors; the embedding and the head count."""
        main = next((scheme for scheme in GGUF if scheme.storage == settings.get("storage")), GGUF[0])
        return {name.rpartition(".")[0]: WeightFormat(CODES[leaf], BLOCK, storage=holding(leaf, main).storage)
                for name in stored if (leaf := name.rpartition(".")[2]) in CODES}

    def reload(self, kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """As the gguf package makes them dense; None for a folder that holds no file yet."""
        if not (folder / FILE).is_file():
            return None
        from gguf import GGUFReader
        from gguf.quants import dequantize

        dense = {one.name: torch.from_numpy(dequantize(one.data, one.tensor_type).copy())
                 for one in GGUFReader(folder / FILE).tensors}
        return {name: tensor.to(dtype) for name, tensor in in_models_order(folder, dense).items()}


# A block of 32: float16 numbers in front, then the fifth bits of codes that have one, then the codes: a byte each, or
# two halves to a byte, the first 16 columns in the low ones.


def to_blocks(codes: torch.Tensor, bits: int, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [rows, bytes of a row].

    Args:
        codes: uint8 [rows, columns], from 0 on. numbers: float16 [rows, groups], in the order of a block; those of a
            group of several blocks stand in each of them.
    """
    rows, columns = codes.shape
    octets, blocks = codes.reshape(rows, -1, BLOCK), columns // BLOCK
    parts = [one.repeat_interleave(blocks // one.shape[1], dim=1).contiguous().view(torch.uint8).reshape(
        rows, blocks, 2) for one in numbers]
    if bits == 5:
        fifth = (octets >> 4).reshape(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        parts.append(fifth.sum(-1, dtype=torch.uint8))
    if bits < 8:
        octets = octets & 15
        octets = octets[..., :HALF] | octets[..., HALF:] << 4
    return torch.cat([*parts, octets], dim=2).reshape(rows, -1)


def from_blocks(packed: torch.Tensor, bits: int, numbers: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes, uint8 [rows, blocks, 32], and so many float16 numbers, each [rows, blocks, 1].

    Args:
        packed: uint8 [rows, blocks, bytes of a block].
    """
    found = [packed[..., 2 * place:2 * place + 2].contiguous().view(torch.float16) for place in range(numbers)]
    octets = packed[..., 2 * numbers:]
    if bits == 8:
        return octets, found
    low = octets[..., -HALF:]
    codes = torch.cat([low & 15, low >> 4], dim=2)
    if bits == 5:
        fifth = octets[..., :4, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes = codes | fifth.flatten(2) << 4
    return codes, found
