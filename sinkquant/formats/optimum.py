"""GPTQ's own format with its weights packed in memory: optimum's quantizer loads it, gptqmodel's kernels compute."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models.loading import class_for, loading_errors, require_complete
from sinkquant.models.progress import no_progress_bars
from sinkquant.quantize import UNPACKED
from sinkquant.schemes.packages import installed

NEEDED = ("optimum", "optimum.gptq", "gptqmodel")


def load_by_optimum(path: Path, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint in GPTQ's format, as transformers loads it through `optimum.gptq`; in float16, which
    that format's scales have.

    Raises:
        RequestError: optimum or gptqmodel is not installed, or they do not load it.
    """
    missing = [module for module in NEEDED if not installed(module)]
    if missing:
        raise RequestError(f"{path} is in GPTQ's format, whose packed weights take optimum's GPTQ quantizer, and "
                           f"that needs {missing[0]}, which is not installed (gptqmodel brings a CUDA build of torch); "
                           "load it without packed=True.")
    with loading_errors(path), no_progress_bars():
        model, info = class_for(path, trust_remote_code).from_pretrained(
            path, dtype=torch.float16, device_map={"": device}, output_loading_info=True,
            trust_remote_code=trust_remote_code)
    require_complete(path, info)
    setattr(model, UNPACKED, True)
    return model.eval()
