"""The metadata of a GGUF file, from the configuration of a model's folder; and the tensors that llama.cpp wants of it
beside the weights."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from sinkquant.errors import RequestError
from sinkquant.schemes.gguf.layout import Metadata, metadata_bytes
from sinkquant.schemes.gguf.names import FAMILIES, Family
from sinkquant.schemes.gguf.tokenizer import tokenizer_metadata
from sinkquant.schemes.json_object import read_object

QUANTIZATION_VERSION = 2
"""Of ggml's block formats."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25, "BF16": 32}
"""What llama.cpp calls a file by the kind of most of its tensors."""
BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Depths for which llama.cpp scales attention by the width of the stream over the heads."""
WINDOW_EVERY = {"gemma2": 2, "gemma3": 6}
"""Every so many layers the last one sees the whole row; llama.cpp takes that from the architecture."""
ENDS_OF_TEXT = {"llama": (1, 2), "gemma2": (2, 1), "gemma3": (2, 1), "phi3": (1, 32000)}
"""First and last token that transformers takes, and writes, where config.json has no key for them."""

YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""What llama.cpp takes for granted of this scaling of the rotary embedding."""


def model_metadata(folder: Path, architecture: str, kind: str = "Q4_0") -> Metadata:
    """All keys of a file.

    Args:
        folder: of the model, with configuration and tokenizer. architecture: transformers' class. kind: of most
            tensors.

    Raises:
        RequestError: llama.cpp cannot be told what the configuration or the tokenizer says.
    """
    family, config = family_of(architecture), read_json(folder / "config.json")
    try:
        shape = {f"{family.architecture}.{key}": value for key, value in _shape(family, config, folder).items()}
    except KeyError as error:
        raise RequestError(f"{folder / 'config.json'} does not say {error.args[0]}, and a GGUF file has to; add "
                           "it.") from error
    rows = int(config["vocab_size"])
    tokenizer = _special_ids(family, config, rows) | tokenizer_metadata(folder, rows)
    # llama.cpp looks for this token in the vocabulary of every model whose name says Phi-3, and ends without it.
    named = family.architecture != "phi3" or "<|endoftext|>" in tokenizer["tokenizer.ggml.tokens"][1]
    general: dict[str, tuple[str, Any]] = {
        "general.architecture": ("str", family.architecture), "general.type": ("str", "model"),
        "general.name": ("str", family.title if named else "Phi"), "general.quantized_by": ("str", "sinkquant"),
        "general.quantization_version": ("u32", QUANTIZATION_VERSION), "general.file_type": ("u32", FILE_TYPES[kind])}
    return general | shape | tokenizer


def _special_ids(family: Family, config: dict[str, Any], rows: int) -> dict[str, tuple[str, Any]]:
    """The ids of first and last tokens in config.json, for a tokenizer that does not name them."""
    usual = zip(("bos", "eos"), ENDS_OF_TEXT.get(family.architecture, (None, None)), strict=True)
    ids = {kind: config.get(f"{kind}_token_id", one) for kind, one in usual}
    return {f"tokenizer.ggml.{kind}_token_id": ("u32", one) for kind, one in ids.items()
            if isinstance(one, int) and 0 <= one < rows}


def metadata_size(folder: str, architecture: str) -> int:
    """Bytes of the metadata.

    Raises:
        RequestError: as `model_metadata`.
    """
    stamps = tuple(path.stat().st_mtime_ns for path in sorted(
        [*Path(folder).glob("*.json*"), *Path(folder).glob("*.jinja")]))
    return _size(folder, architecture, stamps)


@functools.lru_cache(maxsize=8)  # a budget is solved by counting a file's bytes many times
def _size(folder: str, architecture: str, stamps: tuple[int, ...]) -> int:
    return len(metadata_bytes(model_metadata(Path(folder), architecture)))


def rope_factors(folder: Path) -> list[float]:
    """What llama.cpp divides the frequencies of the rotary embedding by, of Llama 3's kind of scaling; empty where a
    file has no such tensor (`rope_freqs.weight`, float32)."""
    config = read_json(folder / "config.json")
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return []
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context, factor, width = float(rope["original_max_position_embeddings"]), float(rope["factor"]), head_width(config)
    found = []
    for index in range(0, width, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (index / width)
        if length < context / high:
            found.append(1.0)
        elif length > context / low:
            found.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def family_of(architecture: str) -> Family:
    """What llama.cpp has of an architecture.

    Raises:
        RequestError: nothing that is written here.
    """
    if architecture not in FAMILIES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        raise RequestError(f"a GGUF file cannot be written of {architecture}, only of {known}; use another backend.")
    return FAMILIES[architecture]


def head_width(config: dict[str, Any]) -> int:
    """Width of one head of attention."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        RequestError: it cannot be read.
    """
    return read_object(path, "copy the model folder again", ", and a GGUF file holds what it says")


def _require_runs_alike(family: Family, config: dict[str, Any], folder: Path) -> None:
    """Refuse what llama.cpp takes for granted of a family, or leaves out of its graph, where this model has it
    otherwise: it would load the file and run another model.

    Raises:
        RequestError: one of these.
    """
    gemma, rope = family.architecture in WINDOW_EVERY, _rope(config)
    activation = config.get("hidden_activation" if gemma else "hidden_act")
    if activation not in ((None, "gelu_pytorch_tanh") if gemma else (None, "silu", "swish")):
        raise RequestError(f"{folder} has the activation {activation!r}, which llama.cpp does not compute in a "
                           f"{family.title}; use another backend.")
    missing = [key for key in ("attn_logit_softcapping", "final_logit_softcapping")
               if family.architecture == "gemma2" and key in config and not config[key]]
    if missing:
        raise RequestError(f"{folder} has no {missing[0]}, and llama.cpp caps in every Gemma 2; use another backend.")
    if config.get("attention_bias") and (gemma or family.architecture == "qwen3"):
        raise RequestError(f"{folder} has biases in its attention, which llama.cpp does not read in a {family.title}; "
                           "use another backend.")
    if family.architecture.startswith("qwen") and _slides(config):
        raise RequestError(f"{folder} reads some layers through a sliding window, which llama.cpp does not do in a "
                           f"{family.title}; use another backend.")
    if rope["rope_type"] == "llama3" and family.architecture != "llama":
        raise RequestError(f"{folder} scales its rotary embedding by 'llama3', which llama.cpp reads in a Llama alone; "
                           "use another backend.")
    usual = YARN | {"attention_factor": 0.1 * math.log(float(rope.get("factor") or 1)) + 1}
    own = [key for key, value in usual.items() if rope.get(key) is not None and (
        value is None or not math.isclose(rope[key], value, rel_tol=1e-6))]
    if own and rope["rope_type"] == "yarn":
        raise RequestError(f"{folder} scales its rotary embedding by yarn with a {own[0]} of {rope[own[0]]}, which no "
                           "GGUF file has here; use another backend.")


def _slides(config: dict[str, Any]) -> bool:
    """Whether some layer of a Qwen has a window, as transformers reads its configuration."""
    kinds = config.get("layer_types")
    if kinds:
        return "sliding_attention" in kinds
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None and int(
        config.get("max_window_layers", 28)) < int(config["num_hidden_layers"])


def _shape(family: Family, config: dict[str, Any], folder: Path) -> dict[str, tuple[str, Any]]:
    _require_runs_alike(family, config, folder)
    width, rope = head_width(config), _rope(config)
    heads = int(config["num_attention_heads"])
    found: dict[str, tuple[str, Any]] = {
        "context_length": ("u32", config["max_position_embeddings"]), "block_count": ("u32",
                                                                                      config["num_hidden_layers"]),
        "embedding_length": ("u32", config["hidden_size"]), "feed_forward_length": ("u32",
                                                                                    config["intermediate_size"]),
        "attention.head_count": ("u32", heads),
        "attention.head_count_kv": ("u32", config.get("num_key_value_heads") or heads),
        "attention.key_length": ("u32", width), "attention.value_length": ("u32", width),
        "attention.layer_norm_rms_epsilon": ("f32", config["rms_norm_eps"]),
        "rope.dimension_count": ("u32", int(width * float(rope.get("partial_rotary_factor") or 1))),
        "rope.freq_base": ("f32", rope["rope_theta"]), "vocab_size": ("u32", config["vocab_size"])}
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        found |= {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", rope["factor"])}
    elif kind == "yarn":
        found |= {"rope.scaling.type": ("str", "yarn"), "rope.scaling.factor": ("f32", rope["factor"]),
                  "rope.scaling.original_context_length": (
                      "u32", rope.get("original_max_position_embeddings") or config["max_position_embeddings"])}
    elif kind not in ("default", "llama3"):
        raise RequestError(f"{folder} scales its rotary embedding by {kind!r}, which no GGUF file has here; "
                           "use another backend.")
    if family.architecture in WINDOW_EVERY:
        found |= _gemma(family, config, folder)
    if family.architecture == "phi3":
        found["rope.scaling.original_context_length"] = (
            "u32", config.get("original_max_position_embeddings") or config["max_position_embeddings"])
        if config.get("sliding_window"):  # llama.cpp warns that it leaves it out
            found["attention.sliding_window"] = ("u32", config["sliding_window"])
    return found


def _gemma(family: Family, config: dict[str, Any], folder: Path) -> dict[str, tuple[str, Any]]:
    """Windows and caps, and what llama.cpp takes for granted of them."""
    width, every, layers = head_width(config), WINDOW_EVERY[family.architecture], config["num_hidden_layers"]
    expected = ["full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)]
    if config.get("layer_types") not in (None, expected):
        raise RequestError(f"{folder} has other layers with a window than llama.cpp takes for granted of "
                           f"{family.title} (all but every {every}th); use another backend.")
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == BLOCKS_OF_27B[
        family.architecture] else width
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        raise RequestError(f"{folder} scales attention by {config['query_pre_attn_scalar']}, where llama.cpp takes "
                           f"{scalar} of a {family.title} of this size; use another backend.")
    found: dict[str, tuple[str, Any]] = {"attention.sliding_window": ("u32", config["sliding_window"])}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            found[key] = ("f32", config[key])
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    base = local["rope_theta"] if local else config.get("rope_local_base_freq")
    return found | ({"rope.freq_base_swa": ("f32", base)} if base else {})


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of layers that see the whole row, in transformers 5's words or those before."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given.get("full_attention", given)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "yarn" and given.get("factor") is None:
        longest = config["max_position_embeddings"]
        given = given | {"factor": longest / (given.get("original_max_position_embeddings") or longest)}
    return {"rope_theta": config.get("rope_theta", 10000.0), "partial_rotary_factor": config.get(
        "partial_rotary_factor")} | given | {"rope_type": kind}
