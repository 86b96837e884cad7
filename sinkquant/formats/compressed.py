"""compressed-tensors' formats: what vLLM and plain transformers load."""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models.inputs import input_args
from sinkquant.quantize import PackedWeight, row_chunks
from sinkquant.schemes import PLAIN, WeightFormat, scheme_of

EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
"""What ends the name of one projection of one expert."""


def quantization_config(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per format, every other linear ignored by name."""
    formats: dict[WeightFormat, list[str]] = {}
    for name, form in plan.formats.items():
        formats.setdefault(form, []).append(name)
    groups = {}
    # transformers takes the scheme of all experts from the first group that names any, shared ones included.
    ordered = sorted(formats.items(), key=lambda item: (not any(map(EXPERT.search, item[1])), _order(item[0])))
    for index, (form, names) in enumerate(ordered):
        channel = form.group_size == -1
        weights: dict[str, Any] = {"num_bits": form.bits, "type": form.kind, "symmetric": True, "dynamic": False,
                                   "strategy": "channel" if channel else "group",
                                   "group_size": None if channel else form.group_size}
        groups[f"group_{index}"] = {"targets": _targets(names), "weights": weights,
                                    "input_activations": _inputs(form), "output_activations": None,
                                    "format": scheme_of(form).layout(form)}
    packed = {name for names in formats.values() for name in names}
    ignore = [name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and name not in packed]
    layouts = sorted({scheme_of(form).layout(form) for form in formats})
    return {"quant_method": "compressed-tensors", "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed", "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None}


def _targets(names: list[str]) -> list[str]:
    """One pattern per linear, and one for all packed experts: there are thousands, and no module has their names."""
    layers: dict[str, set[str]] = {}
    for name in names:
        if found := EXPERT.search(name):
            layers.setdefault(name[:found.start()], set()).add(found[1])
    targets = [f"re:^{re.escape(name)}$" for name in names if not EXPERT.search(name)]
    if layers:
        owners = "|".join(map(re.escape, layers))
        leaves = "|".join(sorted(set().union(*layers.values())))
        targets.append(rf"re:^(?:{owners})\.experts\.\d+\.(?:{leaves})$")
    return targets


def _order(form: WeightFormat) -> tuple[int, int, str, str, str]:
    return form.bits, form.group_size or 0, form.kind, form.inputs, form.input_scale or ""


def _inputs(form: WeightFormat) -> dict[str, Any] | None:
    """How an engine is asked to round inputs; null where it is not."""
    if form.inputs == "16-bit" or form.input_scale is None:
        return None
    args = input_args(form.inputs, form.input_scale)
    return {"num_bits": args.num_bits, "type": args.type, "symmetric": True, "dynamic": args.dynamic,
            "strategy": args.strategy, "group_size": None}


def stored_linear(name: str, weight: PackedWeight, form: WeightFormat,
                  input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The tensors that a quantized linear becomes."""
    inputs = {f"{name}.input_scale": input_scale} if form.static_inputs and input_scale is not None else {}
    if scheme_of(form).layout(form) != PLAIN:
        return {f"{name}.weight": weight.codes, f"{name}.weight_scale": weight.scale} | inputs
    beside = {} if weight.side is None else weight.side.tensors()
    return {f"{name}.weight_packed": pack(weight.codes, weight.bits), f"{name}.weight_scale": weight.scale,
            f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
            **{f"{name}.{leaf}": tensor for leaf, tensor in beside.items()}} | inputs


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack_to_int32` of compressed-tensors gives, int32 [rows, words], several times as fast where a word holds
    whole codes. codes: int8 [rows, columns]."""
    rows, columns = codes.shape
    if bits not in (2, 4, 8) or columns % 16:
        return torch.cat([pack_to_int32(codes[part], bits) for part in row_chunks(codes)])
    words = torch.empty(rows, columns * bits // 32, dtype=torch.int32)
    short = {2: torch.int16, 4: torch.int32, 8: torch.int64}[bits]
    for part in row_chunks(codes):
        eight = (codes[part].contiguous().view(torch.uint8) + 2 ** (bits - 1)).view(torch.int64)
        field, used = 8, bits
        while used < field < 64:  # close the gap between two fields: they become one of twice the width
            kept = sum(((1 << 2 * used) - 1) << start for start in range(0, 64, 2 * field))
            eight = (eight | eight >> (field - used)) & kept
            field, used = 2 * field, 2 * used
        words[part] = eight.view(short)[:, ::64 // (8 * bits)].contiguous().view(torch.int32)
    return words
