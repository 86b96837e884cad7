"""An adapter (LoRA and its kin) as a model's folder: merged into its base model by peft, once, and kept.

An adapter's folder names its base model in `adapter_config.json`; where it holds weights of a model as well, those are
the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from sinkquant.errors import RequestError, first_line
from sinkquant.models.dequantized import copy_files, model_key
from sinkquant.models.folder import ADAPTER, check_folder, read_settings, weight_files
from sinkquant.models.gguf import SOURCE, SOURCE_FOLDER, made_of
from sinkquant.models.kept import kept, require_room
from sinkquant.models.loading import class_for, has_tokenizer
from sinkquant.models.progress import no_progress_bars
from sinkquant.schemes.json_object import read_object
from sinkquant.schemes.packages import installed

WEIGHTS = "adapter_model.safetensors"
MARK = 2
"""Version of what is kept beside a merged model, which one that was merged before lacks."""


def base_named(folder: Path) -> str:
    """The base model that an adapter's folder names: a folder, beside the adapter too, or a hub id.

    Raises:
        RequestError: it names none.
    """
    path = folder / ADAPTER
    name = read_object(path, "copy the adapter again").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{path} names no base model (base_model_name_or_path); write its folder or hub id there.")
    beside = folder / name
    return str(beside) if not Path(name).is_dir() and beside.is_dir() else name


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
    settings = read_object(folder / ADAPTER, "copy the adapter again")
    if not (folder / WEIGHTS).is_file():
        raise RequestError(f"{folder} has {ADAPTER}, but no {WEIGHTS}; copy the adapter again, or convert its weights "
                           "to safetensors (peft: save_pretrained).")
    if not installed("peft"):
        raise RequestError(f"{folder} holds an adapter ({ADAPTER}), and peft, which merges it into its base model, is "
                           "not installed; pip install peft, or name the folder of a merged model.")
    if read_settings(base).get("quantization_config") is not None:
        raise RequestError(f"{folder} is an adapter of {base}, whose weights are quantized; name the unquantized base "
                           f"model in {ADAPTER} (base_model_name_or_path).")
    if base != folder:
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
        return {"file": base.resolve().name, "types": {}} | made_of(base) | {"adapter": folder.resolve().name}

    given = str((MARK, folder.resolve(), stat.st_size, stat.st_mtime_ns)).encode() + (folder / ADAPTER).read_bytes()
    key = f"{model_key(base)}-{hashlib.sha256(given).hexdigest()[:16]}"
    return kept("merged", key, SOURCE_FOLDER, stat.st_mtime_ns, make, f"keep what {folder} is merged to")


def _merge(folder: Path, base: Path, aside: Path, settings: dict[str, Any]) -> None:
    import peft

    try:
        with (_without_adapter(base) as plain, no_progress_bars(), torch.no_grad(), warnings.catch_warnings()):
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            model = class_for(plain).from_pretrained(plain, dtype="auto")
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
    except (OSError, SafetensorError):  # the disk
        raise
    except Exception as error:
        raise RequestError(f"{folder} merged into {base} cannot be saved: {first_line(error)}.") from error
    made = (aside / "config.json").read_bytes()
    copy_files(base, aside)
    (aside / "config.json").write_bytes(made)
    (aside / ADAPTER).unlink(missing_ok=True)
    if has_tokenizer(folder) and folder != base:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (
                    ADAPTER, "config.json", "trainer_state.json"):
                shutil.copyfile(path, aside / path.name)


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
