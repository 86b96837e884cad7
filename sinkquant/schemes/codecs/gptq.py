"""GPTQ's own format: unsigned codes and zeros in int32 words, and checkpoints as gptqmodel and vLLM read them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs.codec import Codec, Leaves, StoredWeight
from sinkquant.schemes.codecs.files import LibraryFiles, kept_linears
from sinkquant.schemes.codecs.grid import Grid
from sinkquant.schemes.codecs.packed import PackedWeight
from sinkquant.schemes.codecs.zeros import ZeroGrid, ZeroWeight
from sinkquant.schemes.gptq import BACKEND, GPTQ, LEAST_ZERO, ZEROS

WORD = 32
PIECE = 1 << 22
"""Codes that are packed at a time."""
QWEIGHT = ".qweight"


@dataclass(frozen=True)
class GPTQCodec(Codec):
    """Writes columns in their own order; reads zeros of any value, columns in any order of groups."""

    def leaves(self, weight: StoredWeight, form: WeightFormat, input_scale: torch.Tensor | None = None) -> Leaves:
        """qweight int32 [columns * bits / 32, rows], qzeros int32 [groups, rows * bits / 32], scales float16
        [groups, rows], g_idx int32 [columns]. Zeros are stored less one, as the format's first version does
        (gptqmodel: "gptq")."""
        assert isinstance(weight, PackedWeight)
        rows, columns = weight.codes.shape
        groups = weight.scale.shape[1]
        if isinstance(weight, ZeroWeight):
            codes, scales, zeros = weight.stored()
        else:
            middle = 2 ** (weight.bits - 1)
            codes, scales = weight.codes.to(torch.int32) + middle, weight.scale
            zeros = torch.full((rows, groups), middle, dtype=torch.int32)
        return {"qweight": _pack(codes.to(torch.int32).T.contiguous(), weight.bits),
                "qzeros": _pack(zeros - 1, weight.bits).T.contiguous(), "scales": scales.T.contiguous(),
                "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups)}

    def grid(self, form: WeightFormat, scale_dtype: torch.dtype, fused_scale: torch.Tensor | None = None) -> Grid:
        """Integers, from a zero point of the group on where they are not symmetric."""
        if self.scheme.symmetric:
            return super().grid(form, scale_dtype)
        return ZeroGrid(form.bits, form.group_size or -1, LEAST_ZERO)

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """(code - zero) * scale, [rows, columns] in `dtype`."""
        rows, columns = shape
        codes = _unpack(leaves["qweight"], form.bits, columns)
        zeros = _unpack(leaves["qzeros"].T, form.bits, rows).T + 1
        group = leaves["g_idx"].long()
        scales = leaves["scales"].float()
        return ((codes - zeros[group]).float() * scales[group]).T.to(dtype).contiguous()


class GPTQFiles(LibraryFiles):
    """One width and one group size for all linears that are packed."""

    backend = BACKEND

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Linears that are not packed are named for gptqmodel and vLLM (`dynamic`); where all blocks keep the same,
        also as optimum wants it (`modules_in_block_to_quantize`)."""
        formats = plan.formats
        ((bits, size),) = {(form.bits, form.group_size) for form in formats.values()}
        kept = kept_linears(model, plan)
        found: dict[str, Any] = {
            "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False,
            "sym": all(scheme_of(form).symmetric for form in formats.values()), "lm_head": False,
            "checkpoint_format": "gptq", "damp_percent": plan.calibration.damping, "true_sequential": True,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept},
            "meta": {"quantizer": [f"sinkquant:{importlib.metadata.version('sinkquant')}"]}}
        blocks: dict[str, set[str]] = {}
        for name in plan.modules:
            block, leaf = _parts(name)
            blocks.setdefault(block, set()).update([leaf] if name in formats else [])
        if len({frozenset(leaves) for leaves in blocks.values()}) == 1:
            found["modules_in_block_to_quantize"] = [sorted(next(iter(blocks.values())))]
        return found

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """One width for all."""
        bits = settings.get("bits")
        if bits not in GPTQ.bits or settings.get("checkpoint_format", "gptq") != "gptq":
            raise RequestError(f"{folder} holds GPTQ weights of {bits} bits in the format "
                               f"{settings.get('checkpoint_format')}, which is not read here.")
        zeros = settings.get("sym") is False and bits in ZEROS.bits
        storage = ZEROS.storage if zeros else GPTQ.storage
        found = {key.removesuffix(QWEIGHT): WeightFormat(bits, int(settings.get("group_size", -1)), storage=storage)
                 for key in stored if key.endswith(QWEIGHT)}
        if not found:
            raise RequestError(f"{folder} says that it is in GPTQ's format, but holds no packed weight; load the "
                               "unquantized model without that setting.")
        return found


def _parts(name: str) -> tuple[str, str]:
    """"model.layers.3.mlp.up_proj" -> ("model.layers.3", "mlp.up_proj")."""
    match = re.match(r"(.*?\.\d+)\.(.*)", name)
    assert match is not None
    return match[1], match[2]


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [values, others] in 0 .. 2^bits - 1, 32 divides values -> int32 [values * bits / 32, others], low bits
    first; a code may cross from one word into the next."""
    values, others = codes.shape
    if codes.numel() > PIECE and others > 1:  # it takes dozens of bytes per code meanwhile
        return torch.cat([_pack(part, bits) for part in codes.split(max(1, PIECE // values), dim=1)], dim=1)
    spread = (codes[:, None] >> torch.arange(bits, dtype=torch.int32)[:, None]) & 1
    lines = spread.reshape(values * bits // WORD, WORD, others).to(torch.int64)
    words = (lines << torch.arange(WORD, dtype=torch.int64)[:, None]).sum(1)
    return torch.where(words >= 2 ** 31, words - 2 ** 32, words).to(torch.int32)


def _unpack(words: torch.Tensor, bits: int, values: int) -> torch.Tensor:
    """What `_pack` was given, int32 [values, others]."""
    others = words.shape[1]
    if values * others > PIECE and others > 1:
        return torch.cat([_unpack(part, bits, values) for part in words.split(max(1, PIECE // values), dim=1)], dim=1)
    lines = (words[:, None].to(torch.int64) >> torch.arange(WORD, dtype=torch.int64)[:, None]) & 1
    spread = lines.reshape(values, bits, others)
    return (spread << torch.arange(bits, dtype=torch.int64)[:, None]).sum(1).to(torch.int32)
