"""A model folder, a hub id or "demo" -> model and tokenizer, checked before anything is computed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sinkquant.errors import RequestError
from sinkquant.resources import demo_model

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def resolve(model: str) -> Path:
    """The local folder of a model: "demo", a folder, or a hub id (the hub's offline cache is respected).

    Raises:
        RequestError: there is no such folder or hub model, or the folder is not a complete safetensors checkpoint.
    """
    if model == "demo":
        folder = demo_model()
    elif Path(model).is_dir():
        folder = Path(model)
    elif Path(model).exists() or not HUB_ID.fullmatch(model) or model.startswith("."):
        raise RequestError(f"{model!r} is not a model folder, a hub id (owner/name) or 'demo'.")
    else:
        try:
            folder = Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RequestError(f"{model!r} is no local folder, and the hub did not give it: {reason}") from error
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that transformers could not load completely.

    Raises:
        RequestError: no config.json, no safetensors, a shard that is missing or shorter than its header says.
    """
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} is not a model folder: it has no config.json.")
    for shard in weight_files(folder):
        check_shard(shard)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        RequestError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{index} is broken; copy the model folder again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RequestError(f"{folder} lacks the shard {missing[0]}; copy the model folder again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" (it has {others[0]}; convert it to safetensors first)" if others else ""
    raise RequestError(f"{folder} has no safetensors weights{hint}.")


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """The header of a safetensors file: tensor name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        RequestError: the file is too short or its header is not JSON.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise RequestError(f"{path} is truncated inside its header; copy it again.")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise RequestError(f"{path} is not a safetensors file; copy it again.") from error
    header.pop("__metadata__", None)
    return dict(header)


def check_shard(path: Path) -> None:
    """Compare a safetensors file's size with its header.

    Raises:
        RequestError: it is truncated.
    """
    header = read_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    needed = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)  # type: ignore[index]
    found = path.stat().st_size
    if found < needed:
        raise RequestError(f"{path} is truncated: it has {found} of {needed} bytes; copy it again.")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a model's folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        RequestError: it has none, or one that transformers cannot read.
    """
    if not has_tokenizer(folder):
        raise RequestError(f"{folder} has no tokenizer; put its tokenizer.json beside config.json.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RequestError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def load_model(folder: Path, dtype: torch.dtype | str = "auto", device: str = "cpu",
               trust_remote_code: bool = False, placement: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The folder's causal language model in evaluation mode, every weight present and finite.

    Args:
        placement: arguments of `from_pretrained` that say where weights go, instead of `device`.

    Raises:
        RequestError: no causal decoder of that architecture, missing tensors, NaN or Inf among the weights.
    """
    config = read_config(folder, trust_remote_code)
    with loading_errors(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code,
            **(placement or {}))
    if info.get("missing_keys"):
        raise RequestError(f"{folder} lacks the tensor {sorted(info['missing_keys'])[0]}; "
                           "the checkpoint does not belong to its config.json.")
    check_finite(model)
    return (model if placement else model.to(device)).eval()


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The folder's configuration.

    Raises:
        RequestError: it is not one of a causal decoder.
    """
    with loading_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(f"{type(config).__name__} is not supported: it is an encoder-decoder, not a decoder.")
    if not trust_remote_code and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RequestError(f"the architecture {config.model_type!r} is not supported: "
                           "transformers has no causal language model of it.")
    return config


@contextlib.contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """What transformers raises about a folder becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        raise RequestError(f"{folder} cannot be loaded: {_first_line(error)}") from error


def check_finite(model: torch.nn.Module) -> None:
    """Refuse NaN and Inf among the parameters that are in memory.

    Raises:
        RequestError: naming the first tensor that holds one.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise RequestError(f"the weight {name} holds NaN or Inf; the checkpoint is broken, get it again.")


def pick_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu".

    Raises:
        RequestError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("compute.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'.")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith(".") else f"{line}."
