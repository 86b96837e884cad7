"""GPTQ's own format with its weights packed in memory: optimum's quantizer loads it, gptqmodel's kernels compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.formats.bars import no_bars
from sinkquant.formats.opened import require_complete
from sinkquant.models.loading import loading_errors
from sinkquant.quantize import UNPACKED

NEEDED = ("optimum", "optimum.gptq", "gptqmodel")


def load_by_optimum(path: Path, device: str) -> PreTrainedModel:
    """The model of a checkpoint in GPTQ's format, as transformers loads it through `optimum.gptq`; in float16, which
    that format's scales have.

    Raises:
        RequestError: optimum or gptqmodel is not installed, or they do not load it.
    """
    missing = [module for module in NEEDED if not _installed(module)]
    if missing:
        raise RequestError(f"{path} is in GPTQ's format, whose packed weights take optimum's GPTQ quantizer, and "
                           f"that needs {missing[0]}, which is not installed (gptqmodel brings a CUDA build of torch); "
                           "load it without packed=True.")
    with loading_errors(path), no_bars():
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map={"": device},
                                                           output_loading_info=True)
    require_complete(path, info)
    setattr(model, UNPACKED, True)
    return model.eval()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
