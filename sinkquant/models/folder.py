"""A model's name -> its folder, and which of the files there transformers would load."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sinkquant.errors import RequestError, first_line
from sinkquant.models.gguf import SUFFIX, gguf_in, unpacked
from sinkquant.models.gguf_index import FILE, OURS, is_gguf_checkpoint, read_index
from sinkquant.models.headers import read_header
from sinkquant.resources import demo_model
from sinkquant.schemes.json_object import read_object

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FP8 = "fp8"
DEQUANTIZED = (FP8, "mxfp4")
"""Ways that models are published in alone: their weights are made dense."""
NOT_READ = ["*.bin", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "original/*",
            "consolidated*"]
"""Other libraries' copies of a hub model's weights, which are not downloaded."""
DERIVED = ("quantization_config", "torch_dtype", "dtype", "transformers_version", "architectures", "_name_or_path",
           "transformers_weights")
"""Keys of config.json that are a checkpoint's own."""
RUN_MODEL = "model"
"""The checkpoint's folder inside a run's folder."""


def inside_run(name: str | os.PathLike[str]) -> str:
    """The checkpoint inside a run's folder, or what was named."""
    name = os.fspath(name)
    path = Path(name)
    one = path / RUN_MODEL / "config.json"
    return str(one.parent) if one.is_file() and not (path / "config.json").is_file() else name.rstrip("/") or name


def name_of(folder: Path) -> str:
    """What a folder is called: of a snapshot in the hub's cache, whose own name is a commit, the repository."""
    folder = folder.resolve()
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: "demo", a folder, a GGUF file or a folder with one, or a hub id (the hub's offline
    cache is respected). What was published in FP8 or MXFP4 is dequantized first, and an adapter merged.

    Args:
        revision: of a hub model; None for its main one.

    Raises:
        RequestError: there is no such folder or hub model, or the folder is not a complete safetensors checkpoint.
    """
    if model == "demo":
        folder = demo_model()
    elif Path(model).is_dir():
        packed = None if is_gguf_checkpoint(Path(model)) else gguf_in(Path(model))
        folder = Path(model) if packed is None else unpacked(packed)
    elif Path(model).is_file() and model.endswith(SUFFIX):
        ours = Path(model).name == FILE and is_gguf_checkpoint(Path(model).parent)
        folder = Path(model).parent if ours else unpacked(Path(model))
    elif not on_hub(model):
        raise RequestError(f"{model!r} is not a model folder, a GGUF file, a hub id (owner/name) or 'demo'.")
    else:
        folder = downloaded(model, revision)
        if (folder / OURS).is_file():  # its weights may be in a GGUF file
            downloaded(model, folder.name, FILE)
    if (folder / ADAPTER).is_file():
        from sinkquant.models.adapters import base_of, merged  # brings torch along

        return merged(folder, folder if _has_weights(folder) else base_of(folder))
    check_folder(folder)
    if method_of(folder) in DEQUANTIZED:
        from sinkquant.models.dequantized import dequantized  # brings torch along

        return dequantized(folder)
    return folder


def on_hub(model: str) -> bool:
    """Whether a name is that of a hub model, and of nothing here."""
    return HUB_ID.fullmatch(model) is not None and not model.startswith(".") and not Path(model).exists()


def downloaded(model: str, revision: str | None, only: str | None = None) -> Path:
    """The snapshot of a hub model, with all files that are read there.

    Args:
        only: the one file that is asked for.

    Raises:
        RequestError: the hub did not give it.
    """
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=only,
                                      ignore_patterns=NOT_READ if only is None else None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RequestError(f"{model!r} is no local folder, and the hub did not give it: "
                           f"{first_line(error)}.") from error


def cached(model: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub model that is on this machine; None where there is none, or the name is of no hub model."""
    if not on_hub(model):
        return None
    with contextlib.suppress(HFValidationError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    return None


def _has_weights(folder: Path) -> bool:
    """Whether an adapter's folder holds a whole model as well."""
    others = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    return bool(others) and (folder / "config.json").is_file()


def method_of(folder: Path) -> str | None:
    """How config.json says that the weights are quantized."""
    settings = quantization_of(read_settings(folder))
    return str(settings.get("quant_method")) if isinstance(settings, dict) else None


def quantization_of(settings: Mapping[str, Any]) -> Any:
    """`quantization_config` of a config.json: the model's own or, as transformers reads it, that of its text part."""
    text = settings.get("text_config")
    return settings.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


def published(model: str) -> Path | None:
    """The folder in FP8 or MXFP4 that the name of a resolved model means, as it was published; None where it means
    anything else."""
    folder = cached(model) or Path(model)
    whole = (folder / "config.json").is_file() and not (folder / ADAPTER).is_file()
    return folder if whole and method_of(folder) in DEQUANTIZED else None


def require_baseline(folder: Path) -> None:
    """Refuse a resolved folder whose weights are quantized: nothing is lost beside those.

    Raises:
        RequestError: config.json says so.
    """
    if (method := method_of(folder)) is not None:
        raise RequestError(f"{folder} is quantized ({method}), and a baseline is the unquantized model; name that one.")


def check_folder(folder: Path) -> None:
    """Refuse a folder that transformers could not load completely.

    Raises:
        RequestError: no config.json, no safetensors, or a shard that is missing or shorter than its header says; or its
            weights are quantized in a way that config.json does not say where it is looked for.
    """
    settings, method = read_settings(folder), method_of(folder)
    if method not in (None, *DEQUANTIZED) and not settings.get("quantization_config"):
        raise RequestError(f"{folder} is quantized ({method}, which its text_config says); start from the unquantized "
                           "model.")
    if is_gguf_checkpoint(folder):
        read_index(folder / FILE)
        return
    for shard in weight_files(folder):
        codes = next((name for name, entry in read_header(shard).items() if entry.dtype.startswith("float8_")), None)
        if method is None and codes is not None:
            raise RequestError(f"{shard} holds {codes} in FP8, and config.json has no quantization_config that says "
                               "how it is scaled; start from the unquantized model.")


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it stands in a folder.

    Raises:
        RequestError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob("*/config.json"))
        hint = f"; its subfolder {inside[0]} has one" if inside else ""
        raise RequestError(f"{folder} is not a model folder: it has no config.json{hint}.")
    return read_object(path, "copy the model folder again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers reads, in order: the file that config.json names, the
    single file, the shards of the index; or the GGUF file of one that sinkquant wrote.

    Raises:
        RequestError: there are none, the index names one that is missing, or shards have no index.
    """
    if is_gguf_checkpoint(folder):
        return [folder / FILE]
    named = _named(folder)
    if named is not None and named.endswith(".safetensors"):
        return [folder / named]
    index = folder / (named or INDEX)
    names = _shards(index) if index.is_file() else []  # other engines read it beside a single file too
    if named is None and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RequestError(f"{folder} lacks the shard {missing[0]}; copy the model folder again.")
        return [folder / name for name in names]
    raise RequestError(f"{folder} has no safetensors weights{_instead(folder)}.")


def write_index(folder: Path, placed: Mapping[str, str]) -> None:
    """Write which file of a folder holds which tensor. placed: tensor -> file."""
    index = {"metadata": {}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def with_lost_keys(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers wrote, with the keys of the config.json that it read which it does not know."""
    merged = dict(config)
    for key, value in given.items():
        kept = merged.get(key)
        if key in DERIVED:
            continue
        if key not in merged:
            merged[key] = value
        elif isinstance(kept, dict) and isinstance(value, dict) and key.endswith("_config"):
            merged[key] = with_lost_keys(kept, value)
    return merged


def _named(folder: Path) -> str | None:
    """The weight file that config.json names itself (`transformers_weights`)."""
    path = folder / "config.json"
    named = read_settings(folder).get("transformers_weights") if path.is_file() else None
    if named is None:
        return None
    # By its name, as transformers has it: the files of a hub snapshot are links out of it.
    inside = isinstance(named, str) and Path(os.path.abspath(folder / named)).is_relative_to(os.path.abspath(folder))
    if not inside or not named.endswith((".safetensors", ".safetensors.index.json")) or not (folder / named).is_file():
        raise RequestError(f"{path} names {named!r} as the weights, which is no safetensors file of this folder.")
    return str(named)


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{index} is broken; copy the model folder again.") from error
    if not names:
        raise RequestError(f"{index} names no shard; copy the model folder again.")
    return names


def _instead(folder: Path) -> str:
    """What lies there in place of the weights, in brackets."""
    files = sorted(path.name for path in folder.glob("*") if path.is_file())
    shards = [name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        return f" that transformers would load (it has {shards[0]}, but no {INDEX}; copy that too)"
    variants = [name for name in files if re.fullmatch(r"model\.\w+\.safetensors(\.index\.json)?", name)]
    if variants:
        return f" that transformers would load (it has {variants[0]}; rename that to {SINGLE} to use this variant)"
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        return f" that transformers would load (it has {others[0]}, and looks for {SINGLE})"
    pickled = [name for name in files if name.endswith(".bin")]
    if pickled:
        return f" (it has {pickled[0]}; convert it to safetensors first)"
    inside = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/*.safetensors"))
    return f" (its subfolder {inside[0]} has; name that folder)" if inside else ""
