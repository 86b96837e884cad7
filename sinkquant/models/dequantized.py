"""Folders of models that were published in FP8 or MXFP4 alone, as folders of dense weights: dequantized shard by shard,
and kept where the hub's libraries keep what they make of downloads, so that every command after the first finds them.

FP8 comes with a scale for every block of rows and columns (DeepSeek-V3, Qwen3-FP8), or one for a channel or a tensor.
MXFP4 (OCP Microscaling 1.0) has two codes to a byte and a power of two for every 32 of them (gpt-oss).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sinkquant.errors import RequestError
from sinkquant.models.folder import INDEX, SINGLE, name_of, quantization_of, read_settings, weight_files, write_index
from sinkquant.models.gguf import SOURCE_FOLDER
from sinkquant.models.headers import read_header
from sinkquant.models.kept import kept, require_room
from sinkquant.models.shards import stored_tensors

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
"""What the name of an FP8 weight's scale adds to its own."""
OF_INPUTS = ("input_scale", "activation_scale", "input_scale_inv", "k_scale", "v_scale")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
COPIED = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")


def dequantized(folder: Path) -> Path:
    """The folder of dense weights that a folder in FP8 or MXFP4 stands for, made now unless it was made before. Weights
    are in the dtype of its config.json, bfloat16 where that names none.

    Raises:
        RequestError: it holds a weight whose scale is missing or does not fit.
        SinkquantError: there is no room for the folder.
    """
    settings = read_settings(folder)
    named = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(named, torch.bfloat16)

    def make(aside: Path) -> dict[str, Any]:
        sizes = [math.prod(one.shape) * (2 if one.dtype is torch.uint8 else 1)
                 for one in stored_tensors(folder).values()]
        require_room(sum(sizes) * dtype.itemsize, aside, f"dequantizing {folder}")
        kinds = _write(folder, aside, dtype, settings)
        return {"file": name_of(folder), "types": kinds, "dtype": str(dtype).removeprefix("torch.")}

    return kept("dequantized", model_key(folder), SOURCE_FOLDER, weight_files(folder)[0].stat().st_mtime_ns, make,
                f"keep what {folder} is dequantized to")


def _write(folder: Path, target: Path, dtype: torch.dtype, settings: Mapping[str, Any]) -> dict[str, int]:
    """Every shard becomes one of dense weights. Returns how many tensors of each kind there were."""
    stored = stored_tensors(folder)
    block = quantization_of(settings).get("weight_block_size")
    spent = {name for name in stored if name.endswith(OF_INPUTS)}
    scales: dict[str, str] = {}
    for name, tensor in stored.items():
        if tensor.dtype in FP8:
            found = next((name + end for end in SCALES if name + end in stored), None)
            if found is None:
                raise RequestError(f"{folder} holds {name} in FP8 without a scale beside it; copy the model again.")
            scales[name] = found
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in stored:
            scales[name] = f"{name.removesuffix('_blocks')}_scales"
    spent |= set(scales.values())
    kinds = {"FP8": 0, "MXFP4": 0}
    placed: dict[str, str] = {}
    shards = weight_files(folder)
    for path in shards:
        dense = {}
        for name in read_header(path):
            if name in spent:
                continue
            tensor = stored[name]
            if name not in scales:
                dense[name] = tensor[...]
            elif tensor.dtype in FP8:
                kinds["FP8"] += 1
                dense[name] = from_fp8(name, tensor[...], stored[scales[name]][...], block, dtype)
            else:
                kinds["MXFP4"] += 1
                dense[name.removesuffix("_blocks")] = from_mxfp4(tensor[...], stored[scales[name]][...], dtype)
        save_file(dense, target / (SINGLE if len(shards) == 1 else path.name), metadata={"format": "pt"})
        placed |= dict.fromkeys(dense, path.name)
    if len(shards) > 1:
        write_index(target, placed)
    given = dict(settings) | {"dtype": str(dtype).removeprefix("torch.")}
    if isinstance(given.get("text_config"), dict):
        given["text_config"] = {key: one for key, one in given["text_config"].items() if key != "quantization_config"}
    for key in ("quantization_config", "transformers_weights"):
        given.pop(key, None)
    copy_files(folder, target)
    (target / "config.json").write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    return {name: count for name, count in kinds.items() if count}


def from_fp8(name: str, codes: torch.Tensor, scale: torch.Tensor, block: list[int] | None,
             dtype: torch.dtype) -> torch.Tensor:
    """codes: float8 [..., rows, columns]. scale: of blocks [..., rows / b, columns / b] rounded up, of channels
    [rows] or [rows, 1], or of the whole tensor, one value; those of stacked experts one after the other.

    Raises:
        RequestError: the scale fits none of these.
    """
    if codes.dim() == 3 and (scale.numel() == 1 or len(scale) == len(codes)):
        dense = torch.empty(codes.shape, dtype=dtype)
        for index, expert in enumerate(codes):  # one of them is in float32 at a time
            dense[index] = from_fp8(name, expert, scale if scale.numel() == 1 else scale[index], block, dtype)
        return dense
    scale, values = scale.float(), codes.float()
    if scale.numel() == 1:
        return (values * scale.reshape(())).to(dtype)
    if scale.dim() == values.dim() - 1 and scale.shape == values.shape[:-1]:
        scale = scale[..., None]
    sizes = [1, 1] if scale.shape[-2:] == (values.shape[-2], 1) else list(block or [])
    fits = len(sizes) == 2 and scale.dim() == values.dim() and scale.shape[:-2] == values.shape[:-2] and (
        scale.shape[-1] == 1 or scale.shape[-1] == math.ceil(values.shape[-1] / sizes[1])) and (
        scale.shape[-2] == math.ceil(values.shape[-2] / sizes[0]))
    if not fits:
        raise RequestError(f"the scale of {name} is {list(scale.shape)}, which fits no block of its weight "
                           f"{list(values.shape)} (weight_block_size {block}); copy the model again.")
    rows, columns = values.shape[-2:]
    scale = scale.repeat_interleave(sizes[0], -2)[..., :rows, :]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(sizes[1], -1)[..., :columns]
    return (values * scale).to(dtype)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks: uint8 [experts, rows, groups, 16], the lower half of a byte first. scales: uint8 [experts, rows, groups],
    exponents with a bias of 127.

    Returns:
        [experts, columns, rows], as gpt-oss multiplies with it.
    """
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)])
    dense = []
    for codes, exponents in zip(blocks, scales, strict=True):
        values = levels[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)
        dense.append(torch.ldexp(values, exponents.int()[..., None] - 127).flatten(-2).T.to(dtype))
    return torch.stack(dense).contiguous()


def copy_files(folder: Path, target: Path) -> None:
    """Copy what lies beside the weights of a model: configuration, tokenizer, templates, code."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and path.name.endswith(COPIED) and path.name != INDEX and not any(
                part.startswith((".", "__")) for part in inside.parts):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)


def model_key(folder: Path) -> str:
    """A name for what is made of a folder, which changes with its files."""
    files = [folder / "config.json", *weight_files(folder)]
    given = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return f"{name_of(folder)}-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]}"
