"""A model's folder -> model and tokenizer, checked before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from sinkquant.errors import RequestError, SinkquantError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json",
                   "*.tiktoken", "tiktoken.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a model's folder."""
    return any(path.is_file() for name in TOKENIZER_FILES for path in folder.glob(name))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        RequestError: it has none, or one that transformers cannot read.
    """
    if not has_tokenizer(folder):
        raise RequestError(f"{folder} has no tokenizer; put its tokenizer.json beside config.json.")
    try:
        # mistral-common's, which transformers prefers where that package is installed, is none that lm-eval takes.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, mistral_format=False)
        tokenizer("a b\n", verbose=False)["input_ids"]  # some show only here that they are broken
    except Exception as error:  # the tokenizers library raises bare ones
        raise RequestError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast):
        raise RequestError(f"the tokenizer in {folder} is read by {type(tokenizer).__name__}, which is none of "
                           "transformers' own and evaluation does not take; update transformers, or uninstall "
                           "mistral-common.")
    return tokenizer


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
        model, info = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code,
            **(placement or {}))
    require_complete(folder, info)
    check_finite(model)
    return (model if placement else model.to(device)).eval()


def require_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a folder of which `from_pretrained` reports that it lacks tensors."""
    if info.get("missing_keys"):
        raise RequestError(f"{folder} lacks the tensor {sorted(info['missing_keys'])[0]}; "
                           "the checkpoint does not belong to its config.json.")


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The folder's configuration.

    Raises:
        RequestError: it is not one of a causal decoder, or makes no sense.
    """
    with loading_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(f"{type(config).__name__} is not supported: it is an encoder-decoder, not a decoder.")
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and limit < 0:
        raise RequestError(f"{folder / 'config.json'} gives max_position_embeddings as {limit}; get it again.")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not trust_remote_code and not known:
        raise RequestError(f"the architecture {config.model_type!r} is not supported: "
                           "transformers has no causal language model of it.")
    return config


def class_for(folder: Path, trust_remote_code: bool = False) -> Any:
    """The auto class that loads the model of a folder.

    Raises:
        RequestError: its configuration is not one of a causal decoder.
    """
    return auto_class(read_config(folder, trust_remote_code))


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that makes a configuration's model: that of causal language models, or that of models which read
    images as well, where transformers has no other one or the configuration names it (`architectures`)."""
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    plain = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = (config.architectures or [None])[0]
    if with_images is not None and (plain is None or named == with_images):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """What transformers raises about a folder becomes one sentence."""
    try:
        yield
    except SinkquantError:
        raise
    except Exception as error:  # configurations, kernels and a folder's own code each raise their own
        raise RequestError(f"{folder} cannot be loaded: {_first_line(error)}") from error


def check_finite(model: torch.nn.Module) -> None:
    """Refuse NaN and Inf among the parameters that are in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not all_finite(parameter):
            raise RequestError(f"the weight {name} holds NaN or Inf; the checkpoint is broken, get it again.")


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, which show in the minimum and the maximum: no mask is made."""
    return not values.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def cast_model(model: PreTrainedModel, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on a device and in a dtype; the frequencies of rotary embeddings keep theirs, as they do where
    transformers loads it in that dtype."""
    angles = [(module, name, buffer) for module in model.modules()
              for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    model = model.to(device, dtype)
    for module, name, buffer in angles:
        setattr(module, name, buffer.to(device))
    return model


def dtype_named(dtype: torch.dtype | str) -> torch.dtype | None:
    """A dtype, or None where it is the model's own.

    Raises:
        RequestError: torch has none of that name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not isinstance(found, torch.dtype):
        raise RequestError(f"{dtype!r} is no dtype; give auto, float32, float16 or bfloat16.")
    return found


def pick_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu".

    Raises:
        RequestError: there is no such device.
    """
    available, device = torch.cuda.is_available(), str(device)
    try:
        torch.device(device if device != "auto" else "cpu")
    except RuntimeError as error:
        raise RequestError(f"there is no device {device!r}; use 'auto', 'cpu' or 'cuda'.") from error
    if device.startswith("cuda") and not available:
        raise RequestError("the device asked for is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'.")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = " ".join(part.strip() for part in lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if line.endswith(".") else f"{line}."
