"""A GGUF file as a model's folder: read by transformers, dequantized, and kept where the hub's libraries keep what they
make of downloads, so that every command after the first finds it there."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from sinkquant.errors import RequestError, first_line
from sinkquant.models.kept import kept, require_room

SUFFIX = ".gguf"
SOURCE = "gguf_source.json"
"""Says in the folder which file it was made of; a checkpoint takes it along."""
SOURCE_FOLDER = "dequantized_from.json"
"""The same, where it was made of a folder in FP8 or MXFP4, or of an adapter and its base."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Numbers that were never quantized: GGUF's name -> torch's."""


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other model; None where there is none.

    Raises:
        RequestError: there are several.
    """
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise RequestError(f"{folder} holds {len(files)} GGUF files; name one of them, such as {files[0]}.")
    return files[0]


def gguf_at(place: str) -> Path | None:
    """The GGUF file that a name means: itself one, or the folder of one; None where it is something else."""
    if place.endswith(SUFFIX) and Path(place).is_file():
        return Path(place)
    return gguf_in(Path(place)) if Path(place).is_dir() else None


def contents(path: Path) -> tuple[int, int, str]:
    """Bytes of the tensors of a file, how many values they have, and its format in two words: the type of most."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    packed = {name: count for name, count in types.items() if name not in PLAIN} or types
    return (sum(int(tensor.n_bytes) for tensor in tensors), sum(int(tensor.n_elements) for tensor in tensors),
            f"GGUF {max(packed, key=lambda name: (packed[name], name))}")


def unpacked(path: Path) -> Path:
    """The folder of safetensors that a GGUF file stands for, made now unless it was made before. Weights are in the
    file's own dtype where they were never quantized, and in bfloat16 otherwise.

    Raises:
        RequestError: the file is cut, is no GGUF file, or is one that transformers cannot read.
        SinkquantError: there is no room for the folder.
    """
    def make(aside: Path) -> dict[str, Any]:
        types, values = _types(path)
        dtype = next((kind for name, kind in PLAIN.items() if set(types) == {name}), "bfloat16")
        if set(types) == {"F32", "F16"}:  # norms are in 32 bits in every file
            dtype = "float16"
        require_room(values * (4 if dtype == "float32" else 2), aside, f"unpacking {path}")
        _convert(path, aside, dtype)
        return {"file": path.name, "types": dict(sorted(types.items())), "dtype": dtype}

    return kept("gguf", _key(path), SOURCE, path.stat().st_mtime_ns, make, f"keep what {path} is unpacked to")


def made_of(folder: Path) -> dict[str, Any]:
    """What a folder's mark says that its weights were made of; empty where it has none."""
    path = next((folder / name for name in (SOURCE, SOURCE_FOLDER) if (folder / name).is_file()), None)
    return {} if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def source_notes(folder: Path | None) -> list[str]:
    """What is to be said of where a folder's weights come from."""
    content = {} if folder is None else made_of(folder)
    if not content:
        return []
    packed = [name for name in content["types"] if name not in PLAIN]
    before = (f", where they were quantized before ({', '.join(packed)}): all figures are against those weights, not "
              "the original ones") if packed else ""
    if "adapter" in content:
        return [f"the adapter {content['adapter']} is merged into the weights of {content['file']}{before}"]
    return [f"the weights come from {content['file']}{before}"]


def _key(path: Path) -> str:
    stat = path.resolve().stat()
    made_by = [importlib.metadata.version(name) for name in ("transformers", "gguf")]
    given = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, *made_by]
    return f"{path.stem}-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]}"


def _types(path: Path) -> tuple[Counter[str], int]:
    """How often each kind of numbers stands in a file, and all its values; its parts are looked for, not read."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            begins = file.read(4)
        if begins != b"GGUF":
            raise RequestError(f"{path} is no GGUF file: it does not begin like one.")
        reader = GGUFReader(path)
        ends = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
        split = reader.get_field("split.count")
        count = int(split.contents()) if split is not None else 1
        values = sum(int(tensor.n_elements) for tensor in reader.tensors)
        types = Counter(str(tensor.tensor_type.name) for tensor in reader.tensors)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}.") from error
    except RequestError:
        raise
    except Exception as error:  # whatever numpy, struct and enum say of bytes that are not there
        raise RequestError(f"{path} is cut or broken; copy it again.") from error
    if ends > path.stat().st_size or not types:
        raise RequestError(f"{path} is cut or broken: it ends before its tensors do; copy it again.")
    if count > 1:
        raise RequestError(f"{path} is one of {count} parts, which transformers does not read; merge them first "
                           "(llama-gguf-split --merge).")
    free = psutil.virtual_memory().available
    if 4 * values > free:  # transformers unpacks to float32 first, and holds the model as a whole
        raise RequestError(f"unpacking {path} takes about {4 * values / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
                           "are free; start from the model's safetensors instead.")
    return types, values


def _convert(path: Path, folder: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from sinkquant.models.progress import no_progress_bars

    given: dict[str, Any] = {"gguf_file": path.name}
    try:
        with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):  # where transformers draws one all the same
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
                **given)
    except Exception as error:  # architecture, tokenizer and tensors each fail in their own way
        raise RequestError(f"transformers cannot read {path}: {first_line(error)}.") from error
    if info["missing_keys"]:
        raise RequestError(f"transformers cannot read {path}: it finds no {sorted(info['missing_keys'])[0]} there.")
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
