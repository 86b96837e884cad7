"""Folders of weights that are made of something else once, and kept where the hub's libraries keep what they make of
downloads, so that every command after the first finds them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from safetensors import SafetensorError

from sinkquant.errors import RequestError, SinkquantError


def require_room(needed: float, folder: Path, verb: str) -> None:
    """Refuse to make a folder that the disk has no room for.

    Args:
        needed: bytes. folder: that will be made. verb: what is done, such as "dequantizing X".
    """
    parent = next(one for one in folder.parents if one.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RequestError(f"{verb} takes {needed / 1e9:.1f} GB under {parent}, and {free / 1e9:.1f} GB are free; set "
                           "HF_HOME to a folder with room.")


def kept(namespace: str, key: str, mark: str, when: int, make: Callable[[Path], Mapping[str, Any]],
         verb: str) -> Path:
    """The folder of that key, made now unless it was made before.

    Args:
        namespace: of sinkquant's assets. mark: the file that says what the folder was made of, and that it is whole.
        when: the time that all files get, nanoseconds: the same model has the same files, whenever it is made.
        make: writes the folder, and gives what `mark` says. verb: what is done, such as "dequantize X".

    Raises:
        RequestError: whatever `make` refuses.
        SinkquantError: there is no room for the folder.
    """
    try:
        place = Path(cached_assets_path("sinkquant", namespace=namespace)) / key
        if (place / mark).is_file():
            return place
        aside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            source = make(aside)
            (aside / mark).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            for file in aside.rglob("*"):
                os.utime(file, ns=(when, when))
            if not (place / mark).is_file():  # else another process was faster
                shutil.rmtree(place, ignore_errors=True)  # without its mark it is not whole
                aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SinkquantError(f"cannot {verb}: {reason}; set HF_HOME to a folder with room.") from error
    return place
