"""ggml's blocks, Q4_0, Q4_1 and Q8_0, and checkpoints that are one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
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
from sinkquant.schemes.codecs.codec import Codec, Leaves, Nearest, StoredWeight
from sinkquant.schemes.codecs.files import LibraryFiles, kept_linears
from sinkquant.schemes.codecs.gguf_writer import write_file
from sinkquant.schemes.codecs.grid import Grid, IntegerGrid
from sinkquant.schemes.codecs.packed import PackedWeight
from sinkquant.schemes.codecs.rtn import RTN
from sinkquant.schemes.codecs.zeros import NearestZeros, ZeroGrid, ZeroWeight
from sinkquant.schemes.gguf import BACKEND
from sinkquant.schemes.gguf.names import CODES
from sinkquant.schemes.gguf.scheme import BLOCK, Blocks


@dataclass(frozen=True)
class GGMLCodec(Codec):
    """A block is its scale in float16, then 32 codes: a byte each, or two to a byte with 8 or the zero
    point added, the first 16 columns in the low halves. Q4_1 has its least value behind the scale."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """q4_0, q4_1 or q8_0, uint8 [rows, bytes of a row]."""
        assert isinstance(weight, PackedWeight)
        if isinstance(weight, ZeroWeight):
            codes, scale, zero = weight.stored()
            numbers = [scale, (-scale.float() * zero).to(torch.float16)]  # exact: see zeros.py
        else:
            codes, numbers = weight.codes, [weight.scale.to(torch.float16)]
            codes = (codes + 8).to(torch.uint8) if form.bits == 4 else codes.contiguous().view(torch.uint8)
        rows, columns = codes.shape
        blocks = columns // BLOCK
        octets = codes.reshape(rows, blocks, BLOCK)
        if form.bits == 4:
            octets = octets[..., :BLOCK // 2] | octets[..., BLOCK // 2:] << 4
        heads = [one.repeat_interleave(blocks // one.shape[1], dim=1).contiguous().view(torch.uint8).reshape(
            rows, blocks, 2) for one in numbers]
        return {self._kind(form): torch.cat([*heads, octets], dim=2).reshape(rows, -1)}

    def nearest(self, form: WeightFormat, scale_dtype: torch.dtype, scale_search: bool,
                fused_scale: torch.Tensor | None = None) -> Nearest:
        """To the nearest integer."""
        if self._zeros(form):
            return NearestZeros(ZeroGrid(form.bits, form.group_size or -1), scale_search)
        return RTN(form.bits, form.group_size or -1, scale_dtype, scale_search)

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> Grid:
        """Whole numbers; those of 4 bits from a zero point of the group on."""
        return ZeroGrid(form.bits, form.group_size or -1) if self._zeros(form) else IntegerGrid(form.bits, scale_dtype)

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """code * scale, and the least value added in Q4_1, [rows, columns] in `dtype`."""
        rows, columns = shape
        stored = leaves[self._kind(form)].reshape(rows, columns // BLOCK, -1)
        zeros = self._zeros(form)
        scales = stored[..., :2].contiguous().view(torch.float16).float()
        octets = stored[..., 4 if zeros else 2:]
        if form.bits == 8:
            return (octets.contiguous().view(torch.int8).float() * scales).reshape(rows, columns).to(dtype)
        codes = torch.cat([octets & 15, octets >> 4], dim=2).float()
        least = stored[..., 2:4].contiguous().view(torch.float16).float() if zeros else -8 * scales
        return (codes * scales + least).reshape(rows, columns).to(dtype)

    def _zeros(self, form: WeightFormat) -> bool:
        return form.bits == 4 and not self.scheme.symmetric

    def _kind(self, form: WeightFormat) -> str:
        assert isinstance(self.scheme, Blocks)
        return self.scheme.kind_of(form.bits)


class GGUFFiles(LibraryFiles):
    """One file that llama.cpp runs; beside it what every checkpoint has."""

    backend = BACKEND

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """What says that the weights are in the file."""
        storage = next(iter(plan.formats.values())).storage
        return {"quant_method": BACKEND, "file": FILE, "storage": storage,
                "modules_to_not_convert": kept_linears(model, plan)}

    def finish(self, folder: Path, plan: Plan, architecture: str) -> None:
        """Make the one file of the safetensors files, which go."""
        scheme = scheme_of(next(iter(plan.formats.values())))
        assert isinstance(scheme, Blocks)
        write_file(folder, scheme, architecture)

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """By the kinds of the file's tensors; the embedding and the head count."""
        storage = str(settings.get("storage", BACKEND))
        return {name.rpartition(".")[0]: WeightFormat(int(leaf[1]), BLOCK, storage=storage)
                for name in stored if (leaf := name.rpartition(".")[2]) in CODES}

    def reload(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """As the gguf package makes them dense; None for a folder that holds no file yet."""
        if not (folder / FILE).is_file():
            return None
        from gguf import GGUFReader
        from gguf.quants import dequantize

        dense = {one.name: torch.from_numpy(dequantize(one.data, one.tensor_type).copy())
                 for one in GGUFReader(folder / FILE).tensors}
        return {name: tensor.to(dtype) for name, tensor in in_models_order(folder, dense).items()}
