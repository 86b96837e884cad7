"""An adapter (LoRA and its kin) as a model's folder: merged into its base model by peft, once, and kept.

An adapter's folder names its base model in `adapter_config.json`; where it holds weights of a model as well, those are
the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sinkquant.errors import RequestError, first_line
from sinkquant.models.dequantized import copy_files, model_key
from sinkquant.models.folder import (
    ADAPTER,
    DEQUANTIZED,
    SINGLE,
    check_folder,
    downloaded,
    method_of,
    name_of,
    on_hub,
    quantization_of,
    read_settings,
    resolve,
    weight_files,
    with_lost_keys,
    write_index,
)
from sinkquant.models.gguf import SOURCE, SOURCE_FOLDER, made_of
from sinkquant.models.headers import read_header
from sinkquant.models.kept import kept, require_room
from sinkquant.models.loading import class_for, has_tokenizer
from sinkquant.models.progress import no_progress_bars
from sinkquant.models.unused import unused_of
from sinkquant.schemes.json_object import read_object
from sinkquant.schemes.packages import installed

WEIGHTS = "adapter_model.safetensors"
MARK = 3
"""Version of what is kept beside a merged model, which one that was merged before lacks."""


def base_of(folder: Path) -> Path:
    """The folder of the base model that an adapter's folder names: a folder, beside the adapter too, or a hub id.

    Raises:
        RequestError: it names none, or a hub model that is quantized, which is not downloaded; or `merged` would refuse
            the adapter whatever its base is.
    """
    settings, path = _settings(folder), folder / ADAPTER
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{path} names no base model (base_model_name_or_path); write its folder or hub id there.")
    beside = folder / name
    if not Path(name).is_dir() and beside.is_dir():
        name = str(beside)
    revision = str(revision) if revision else None
    if on_hub(name):
        place = downloaded(name, revision, "config.json")
        if (place / "config.json").is_file() and method_of(place) not in (None, *DEQUANTIZED):
            raise _quantized(folder, name)
    return resolve(name, revision)


def merged(folder: Path, base: Path) -> Path:
    """The folder of a base model with an adapter merged into it, in the base's dtype, with the adapter's tokenizer
    where it brings one.

    Args:
        folder: of the adapter. base: of its base model; `folder` itself where the weights lie beside the adapter.

    Raises:
        RequestError: peft is not installed, cannot merge such an adapter or does not find its places in this base; the
            base is quantized; or memory has no room for the model.
        SinkquantError: there is no room for the merged folder.
    """
    settings = _settings(folder)
    if quantization_of(read_settings(base)) is not None:
        raise _quantized(folder, base)
    check_folder(base)
    needed = sum(path.stat().st_size for path in weight_files(base))
    free = psutil.virtual_memory().available
    if needed > free:
        raise RequestError(f"merging {folder} takes {needed / 1e9:.1f} GB of memory for its base model, and "
                           f"{free / 1e9:.1f} GB are free; merge it on a larger machine (peft: merge_and_unload).")
    stat = (folder / WEIGHTS).stat()

    def make(aside: Path) -> dict[str, Any]:
        require_room(needed, aside, f"merging {folder}")
        _merge(folder, base, aside, settings)
        (aside / SOURCE).unlink(missing_ok=True)  # the base's, which this one's mark repeats
        return {"file": name_of(base), "types": {}} | made_of(base) | {"adapter": name_of(folder)}

    given = str((MARK, folder.resolve(), stat.st_size, stat.st_mtime_ns)).encode() + (folder / ADAPTER).read_bytes()
    key = f"{model_key(base)}-{hashlib.sha256(given).hexdigest()[:16]}"
    return kept("merged", key, SOURCE_FOLDER, stat.st_mtime_ns, make, f"keep what {folder} is merged to")


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        RequestError: nothing can be merged, whatever the base is.
    """
    if not (folder / WEIGHTS).is_file():
        raise RequestError(f"{folder} has {ADAPTER}, but no {WEIGHTS}; copy the adapter again, or convert its weights "
                           "to safetensors (peft: save_pretrained).")
    if not installed("peft"):
        raise RequestError(f"{folder} holds an adapter ({ADAPTER}), and peft, which merges it into its base model, is "
                           "not installed; pip install peft, or name the folder of a merged model.")
    return read_object(folder / ADAPTER, "copy the adapter again")


def _quantized(folder: Path, base: Path | str) -> RequestError:
    return RequestError(f"{folder} is an adapter of {base}, whose weights are quantized; name the unquantized base "
                        f"model in {ADAPTER} (base_model_name_or_path).")


def _merge(folder: Path, base: Path, aside: Path, settings: dict[str, Any]) -> None:
    import peft

    try:
        with (_without_adapter(base) as plain, no_progress_bars(), torch.no_grad(), warnings.catch_warnings()):
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            model = class_for(plain).from_pretrained(plain, dtype="auto")
            unused = {name: tensor[...] for name, tensor in unused_of(model).carried.items()}
            wrapped = peft.PeftModel.from_pretrained(model, str(folder))
            merge = getattr(wrapped.base_model, "merge_and_unload", None)
            if merge is None:
                raise RequestError(f"{folder} is an adapter of the kind {settings.get('peft_type')}, which is no "
                                   "change of weights and cannot be merged; name the folder of a merged model.")
            whole = merge(safe_merge=True)
    except RequestError:
        raise
    except Exception as error:  # peft and transformers refuse in many ways
        raise RequestError(f"peft cannot merge {folder} into {base}: {first_line(error)}.") from error
    try:
        with no_progress_bars():
            whole.save_pretrained(aside)
        _add_unused(aside, unused)
    except (OSError, SafetensorError):  # the disk
        raise
    except Exception as error:
        raise RequestError(f"{folder} merged into {base} cannot be saved: {first_line(error)}.") from error
    config, given = read_settings(aside), read_settings(base)
    if config.get("model_type") == given.get("model_type"):
        config = with_lost_keys(config, given)
    copy_files(base, aside)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (aside / ADAPTER).unlink(missing_ok=True)
    if has_tokenizer(folder) and folder != base:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (
                    ADAPTER, "config.json", "trainer_state.json"):
                shutil.copyfile(path, aside / path.name)


def _add_unused(folder: Path, unused: dict[str, torch.Tensor]) -> None:
    """Put the base's tensors that transformers does not compute with beside the merged weights."""
    if not unused:
        return
    if (folder / SINGLE).is_file():  # which would be read alone
        (folder / SINGLE).rename(folder / "merged.safetensors")
    save_file(unused, folder / "unused.safetensors", metadata={"format": "pt"})
    write_index(folder, {name: path.name for path in folder.glob("*.safetensors") for name in read_header(path)})


@contextlib.contextmanager
def _without_adapter(base: Path) -> Iterator[Path]:
    """The base model's folder as it would be without an adapter in it, which transformers would load on its own."""
    if not (base / ADAPTER).is_file():
        yield base
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in base.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)
