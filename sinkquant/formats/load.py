"""A checkpoint -> model and tokenizer, with weights as dense as any other model's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.errors import RequestError
from sinkquant.models import load_model, load_tokenizer, resolve


def load(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto",
         device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint that sinkquant wrote, or any other that transformers can.

    Packed weights are made dense at once, so that the model can be observed, evaluated and generated from.

    Raises:
        RequestError: the folder is not a complete checkpoint, or has no tokenizer.
    """
    path = resolve(str(folder))
    tokenizer = load_tokenizer(path)
    return load_dense(path, dtype, device), tokenizer


def load_dense(path: Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The model of a folder in evaluation mode, packed weights made dense."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" not in config:
        return load_model(path, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    row = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        # compressed-tensors unpacks every weight in a hook of the first forward pass.
        model(row, use_cache=False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            _plain(module, name)
    del model.config.quantization_config
    model.hf_quantizer = None
    return model


def _plain(module: torch.nn.Linear, name: str) -> None:
    """Take away what compressed-tensors leaves on a linear, whose forward would round its dense weight once more."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise RequestError(f"{name} was not unpacked by compressed-tensors; install a newer version of it.")
    for leftover in ("weight_scale", "weight_shape", "weight_zero_point", "weight_packed"):
        module._parameters.pop(leftover, None)
        module._buffers.pop(leftover, None)
    for attribute in ("quantization_scheme", "quantization_status", "forward"):
        module.__dict__.pop(attribute, None)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """`sinkquant.json` of a checkpoint with "plan" and "sink_map" parsed, or None where there is none."""
    path = folder / "sinkquant.json"
    if not path.is_file():
        return None
    content = dict(json.loads(path.read_text(encoding="utf-8")))
    content["plan"] = Plan.parse(content["plan"], str(path))
    if content.get("sink_map"):
        content["sink_map"] = SinkMap.parse(content["sink_map"], str(path))
    return content
